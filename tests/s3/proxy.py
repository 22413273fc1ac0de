"""A proxy that injects faults between a reader and an S3 server: each GET of an object meets what a function says."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What happens to one GET of an object.

    `kind` is one of: status (an S3 error answer with `code` and its name `error`), reset and close (of the connection
    after `after` bytes of the body), stall (nothing more comes after `after` bytes), trickle (from there on a byte
    every 0.2 s), short (Content-Length and the body are `after` bytes smaller than they should be), flip (a bit of the
    byte at `after`), whole (the Range is ignored: 200 and the whole object), shifted (the bytes and the Content-Range
    of the range one byte on).
    """

    kind: str
    after: int = 0
    code: int = 503
    error: str = "SlowDown"


Decide = Callable[[str, int], Fault | None]  # (path of the object, how manieth GET of it: 0, 1, ...) -> its fate


class FaultProxy:
    """Serves on loopback until it is closed. A context manager."""

    def __init__(self, upstream_port: int, whole: Callable[[str], bytes], decide: Decide | None = None) -> None:
        """Prepare to serve.

        Args:
            upstream_port: of the S3 server on loopback.
            whole: the content of an object, by its path.
            decide: the faults; None: none yet.
        """
        self.whole = whole
        self.decide: Decide = decide or (lambda path, count: None)
        self.decide_write: Callable[[str], Fault | None] = lambda path: None  # of a PUT; a status or nothing
        self.requests: list[tuple[str, str]] = []  # (path, Range) of every GET of an object
        self.faults = 0
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._upstream_port = upstream_port
        self._ended = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint to give to a client."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def fate(self, path: str, wanted: str) -> Fault | None:
        """Count a GET and decide on it."""
        with self._lock:
            count = self._counts.get(path, 0)
            self._counts[path] = count + 1
            self.requests.append((path, wanted))
            fault = self.decide(path, count)
            self.faults += fault is not None
            return fault

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the proxy serves."""
        self._ended.wait(seconds)

    @property
    def ended(self) -> bool:
        """Whether the proxy is closed."""
        return self._ended.is_set()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        of_object = path.count("/") >= 2 and not path.endswith("/") and "list-type" not in query
        fault = self.owner.fate(path, self.headers.get("Range", "")) if of_object else None
        if fault is not None and fault.kind == "status":
            self._refuse(fault)
        elif fault is not None and fault.kind in ("whole", "shifted"):
            self._misunderstand(path, fault)
        else:
            self._forward(dict(self.headers.items()), b"", fault)

    def do_HEAD(self) -> None:
        self._forward(dict(self.headers.items()), b"", None)

    def do_PUT(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            del self.headers["Expect"]
        body, fault = self._body(), self.owner.decide_write(self.path)
        if fault is not None:
            self._refuse(fault)
        else:
            self._forward(dict(self.headers.items()), body, None)

    do_POST = do_DELETE = do_PUT  # noqa: N815 - the base class's names

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _refuse(self, fault: Fault) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{fault.error}</Code><Message>injected</Message></Error>".encode()
        self.send_response(fault.code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _misunderstand(self, path: str, fault: Fault) -> None:
        content = self.owner.whole(path)  # the Range is signed: the server would refuse another one
        status, content_range = 200, None
        if fault.kind == "shifted" and "Range" in self.headers:
            first, last = (int(end) + 1 for end in self.headers["Range"].removeprefix("bytes=").split("-"))
            status, content_range = 206, f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)

    def _forward(self, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner._upstream_port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():  # with the client's Host: it is signed
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            with suppress(BrokenPipeError, ConnectionResetError):
                self._answer(answer, fault)
        finally:
            upstream.close()

    def _answer(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        length = answer.getheader("Content-Length")
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        if self.command == "HEAD" or length is None:
            content = b"" if self.command == "HEAD" else answer.read()
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        short = fault.after if fault is not None and fault.kind == "short" else 0
        total = max(0, int(length) - short)
        self.send_header("Content-Length", str(total))
        self.end_headers()
        sent = 0
        while sent < total:
            piece = answer.read(min(_CHUNK, total - sent))
            if not piece:
                break
            if fault is not None and self._harm(fault, piece, sent):
                return
            if fault is not None and fault.kind == "flip" and sent <= fault.after < sent + len(piece):
                at = fault.after - sent
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            self.wfile.write(piece)
            sent += len(piece)

    def _harm(self, fault: Fault, piece: bytes, sent: int) -> bool:
        """Whether the connection meets its end in this piece."""
        if fault.kind not in ("reset", "close", "stall", "trickle") or fault.after >= sent + len(piece):
            return False
        self.wfile.write(piece[: fault.after - sent])
        self.wfile.flush()
        self.close_connection = True
        if fault.kind == "reset":
            time.sleep(0.1)  # a reset takes with it what has arrived and was not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault.kind == "stall":
            self.owner.wait(3600.0)
        elif fault.kind == "trickle":
            for byte in piece[fault.after - sent :]:
                if self.owner.ended:
                    break
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.2)
        return True
