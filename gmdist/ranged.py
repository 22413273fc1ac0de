"""Reads of objects through whatever the network does: resumed, retried within a budget, in bounded time."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from gmdist import s3
from gmdist.errors import StorageError

_T = TypeVar("_T")

_BACKOFF_S, _BACKOFF_MOST_S = 0.1, 20.0
_RATE_WINDOW_S = 5.0  # over which a connection must be faster than the minimum rate
_MIN_BYTES_PER_S = 64 * 1024.0
_RETRIES_AT_ONCE, _RETRIES_PER_S = 64.0, 8.0


@dataclass
class Counters:
    """What reading has cost this process so far."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0
    stalls: int = 0  # connections given up because nothing, or too little, came

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Count, from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, int]:
        """The counts by name."""
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self)}


class RetryBudget:
    """Lets a burst of retries through, then a few a second: a storage in trouble is not hammered by a whole cluster."""

    def __init__(self) -> None:
        self._left, self._at_s = _RETRIES_AT_ONCE, time.monotonic()
        self._lock = threading.Lock()

    def delay_s(self) -> float:
        """How long to wait before the retry that is taken from the budget now."""
        with self._lock:
            now_s = time.monotonic()
            self._left = min(_RETRIES_AT_ONCE, self._left + (now_s - self._at_s) * _RETRIES_PER_S) - 1.0
            self._at_s = now_s
            return max(0.0, -self._left / _RETRIES_PER_S)


counters = Counters()
_budget = RetryBudget()


def read_range(
    location: str, start: int, stop: int, *, etag: str, num_bytes: int, stopped: threading.Event | None = None
) -> bytearray:
    """The bytes [start, stop) of one version of an object.

    Args:
        location: s3://bucket/key.
        start, stop: bytes.
        etag: of the version.
        num_bytes: of the whole object.
        stopped: ends the reading early, with a StorageError.

    Raises:
        ChangedError: the object is another version.
        FileNotFoundError: there is no such object.
        StorageError: access is denied, or the time is over.
    """
    part = _Part(bytearray(stop - start))

    def attempt() -> bytearray:
        if part.filled < len(part.content):
            with s3.open_range(location, start + part.filled, stop, etag=etag, num_bytes=num_bytes) as body:
                _fill(part, body, stopped)
        return part.content

    return _persist(location, attempt, stopped, lambda: part.filled)


def read_object(location: str) -> bytearray:
    """A whole object, of whatever version; errors as in `read_range`."""

    def attempt() -> bytearray:
        with s3.open_object(location) as body:
            part = _Part(bytearray(body.num_bytes))
            _fill(part, body, None)
        return part.content

    return _persist(location, attempt, None)


@dataclass
class _Part:
    """A range while it arrives."""

    content: bytearray
    filled: int = 0  # bytes


def _fill(part: _Part, body: s3.Body, stopped: threading.Event | None) -> None:
    """Read a body to its end; TransientError if it breaks off or is too slow. What came stays in the part."""
    since_s, since_bytes = time.monotonic(), part.filled
    while part.filled < len(part.content):
        piece = body.read()
        if not piece:
            raise s3.TransientError(f"the answer ended {len(part.content) - part.filled} bytes early")
        part.content[part.filled : part.filled + len(piece)] = piece
        part.filled += len(piece)
        counters.add(bytes=len(piece))
        _check(stopped)
        window_s = time.monotonic() - since_s
        if window_s >= _RATE_WINDOW_S:
            rate = (part.filled - since_bytes) / window_s
            if rate < _MIN_BYTES_PER_S:
                raise s3.StalledError(f"only {rate:.0f} bytes a second came")
            since_s, since_bytes = time.monotonic(), part.filled


def _persist(
    location: str, attempt: Callable[[], _T], stopped: threading.Event | None, progress: Callable[[], int] = lambda: 0
) -> _T:
    """Attempt something until it succeeds, cannot succeed, or has got no further for as long as it may."""
    timeout_s = s3.config().timeout_s
    since_s, reached = time.monotonic(), 0  # when, in bytes, it had last got further
    failures, renewed = 0, False
    while True:
        counters.add(requests=1)
        try:
            return attempt()
        except s3.ExpiredError as error:
            if renewed:
                raise StorageError(f"{location}: {error}") from error
            renewed = True
            s3.renew_credentials()
        except s3.TransientError as error:
            now_s = time.monotonic()
            if progress() - reached > _MIN_BYTES_PER_S * (now_s - since_s):
                failures, reached, since_s = 0, progress(), now_s
            failures += 1
            counters.add(retries=1, stalls=int(isinstance(error, s3.StalledError)))
            # Full jitter (Brooker 2015): workers that failed together do not come back together.
            pause_s = random.uniform(0.0, min(_BACKOFF_MOST_S, _BACKOFF_S * 2.0**failures))  # noqa: S311
            pause_s = max(pause_s, _budget.delay_s())
            if now_s + pause_s > since_s + timeout_s:
                raise StorageError(
                    f"{location}: stalled: {failures} attempts failed within {timeout_s:.0f} s (data.s3.timeout_s), "
                    f"the last one: {error}; check the network and the storage, then run the same command again"
                ) from error
            (stopped or _NEVER).wait(pause_s)
            _check(stopped)


_NEVER = threading.Event()


def _check(stopped: threading.Event | None) -> None:
    if stopped is not None and stopped.is_set():
        raise StorageError("reading was stopped")
