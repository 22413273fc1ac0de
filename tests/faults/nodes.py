"""Several nodes of a Ray cluster on this machine, each a process group of its own, that can be killed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DEADLINE_S = 60
_SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def environment() -> dict[str, str]:
    """A user's shell: not the test session's cluster, nor its Ray settings."""
    root = str(Path(__file__).parent.parent.parent)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"PYTHONPATH": root, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def free_port() -> int:
    """A port that nothing listens at, and that no connection will be given before it is used.

    A node whose agent finds its port taken dies, seconds after it was there. So it is neither one of those that the
    kernel gives (from 32768 on), nor one of those that Ray gives its workers (to 19999).
    """
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def processes(title: bytes) -> list[int]:
    """Ray's processes of this title; several clusters may be on this machine, but only one of the tests'."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if title in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


class Nodes:
    """A Ray cluster: a head, and nodes that come and go. A context manager; its ports are none of Ray's defaults."""

    def __init__(self, num_cpus: int, token: str | None = None) -> None:
        """A head with so many processors, that whoever has the token may use; None: anybody."""
        self._head_cpus, self._token = num_cpus, token
        self._groups: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.mkdtemp(prefix="ray-")  # pytest's folders are too deep for the path of a socket
        self._port, self._dashboard, client = (free_port() for _ in range(3))
        self.address, self.dashboard = f"127.0.0.1:{self._port}", f"http://127.0.0.1:{self._dashboard}"
        self.settings = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.settings |= {"RAY_TMPDIR": self._folder, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        if token is not None:
            path = Path(self._folder, "token")
            path.touch(0o600)
            path.write_text(token)
            self.settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        self._head = ["--head", f"--port={self._port}", "--dashboard-host=127.0.0.1"]
        self._head += [f"--dashboard-port={self._dashboard}", f"--ray-client-server-port={client}"]

    def __enter__(self) -> "Nodes":
        self._start(self._head_cpus, *self._head)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if self._alive():
                    return self
            except (urllib.error.URLError, ConnectionError):
                pass  # its server is not up yet
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        while self._groups:
            self.kill(0)  # the head too: it would take half a minute to say goodbye
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, num_cpus: int) -> str:
        """Start a node; returns its id once it and its processors are there."""
        before = self._alive()
        # In one folder, nodes would unpack a job's package over each other's.
        folder = tempfile.mkdtemp(prefix="node-", dir=self._folder)
        self._start(num_cpus, f"--address={self.address}", f"--temp-dir={folder}")
        deadline = time.monotonic() + DEADLINE_S
        while not self._alive() - before:
            assert self._groups[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (node,) = self._alive() - before
        return node

    def _alive(self) -> set[str]:
        nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE" and node["resources_total"]}

    def ask(self, path: str) -> Any:
        """What the dashboard's server answers."""
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.dashboard}{path}", headers=headers)) as answer:
            return json.load(answer)

    def announce_end(self, node: str, in_s: int) -> None:
        """Tell Ray that a node will be taken away, as the watchers of spot machines do."""
        drain = [self.command("ray"), "drain-node", f"--address={self.address}", f"--node-id={node}"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        drain += [f"--deadline-remaining-seconds={in_s}"]
        subprocess.run(drain, env=self.settings, check=True, capture_output=True)

    def kill(self, number: int) -> None:
        """Kill a node, with all that runs on it: 0 is the head, -1 the newest."""
        group = self._groups.pop(number)
        os.killpg(group.pid, signal.SIGKILL)
        group.wait()

    def _start(self, num_cpus: int, *options: str) -> None:
        command = [self.command("ray"), "start", "--block", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={free_port()}", *options]
        self._groups.append(subprocess.Popen(command, env=self.settings, start_new_session=True, **_SILENT))

    def command(self, name: str) -> str:
        """The path of a command of this environment."""
        path = shutil.which(name, path=self.settings["PATH"])
        assert path is not None
        return path
