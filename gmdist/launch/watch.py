"""What the driver looks out for while workers run: signals, and machines that come and go."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gmdist.config import Config
from gmdist.launch.cluster import leaving, room

_POLL_S = 0.25
_WATCHED_S = 2.0  # how often the cluster is looked at


class Stopper:
    """While installed, the first SIGINT or SIGTERM asks the workers to stop, the second ends the process at once.

    It is there before Ray is: an interrupt during Ray's own start would be swallowed.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.mailbox: Any = None  # of the workers that are running, if any
        self.asked = False
        self._on_message = on_message

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.ask()

    def ask(self) -> None:
        """Ask the workers to stop."""
        self.asked = True
        self._on_message("stopping: running workers save a checkpoint first; once more to stop at once")
        if self.mailbox is not None:
            self.mailbox.request_stop.remote()

    def check(self) -> None:
        """KeyboardInterrupt if a stop was asked for while no worker ran."""
        if self.asked:
            raise KeyboardInterrupt


class Surroundings:
    """What happens to the cluster while workers run: machines that will leave, and machines that have come."""

    def __init__(self, config: Config, size: int, mailbox: Any, on_message: Callable[[str], None]) -> None:
        self._config, self._size, self._mailbox, self._on_message = config, size, mailbox, on_message
        self._leaving: set[str] = set()
        self._next_look_s = 0.0
        self._has_asked = False

    def look(self) -> None:
        """Every now and then, ask the workers to save before a machine leaves, and to stop where more could run."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _WATCHED_S
        now = leaving()
        if now - self._leaving:
            self._on_message("a machine will be taken away: saving a checkpoint")
            self._mailbox.request_save.remote()
        self._leaving |= now
        sizes = self._config.cluster.sizes(self._config.data.batch_size)
        there = room(self._config.cluster)
        if not self._has_asked and any(self._size < size <= there for size in sizes):
            self._has_asked = True
            self._on_message(f"the cluster has room for {there} workers: saving a checkpoint, to go on with more")
            self._mailbox.request_stop.remote()


def choose_size(config: Config, before: int | None, on_message: Callable[[str], None], stopper: Stopper) -> int:
    """How many workers to start: the most that the cluster has room for; waits until there is room for the least."""
    sizes = config.cluster.sizes(config.data.batch_size)
    has_told = False
    while True:
        stopper.check()
        there = room(config.cluster)
        fitting = [size for size in sizes if size <= there]
        if fitting:
            if before is not None and fitting[-1] != before:
                on_message(f"going on with {fitting[-1]} workers instead of {before}")
            return fitting[-1]
        if not has_told:
            on_message(f"waiting: the run needs {sizes[0]} workers, and the cluster has room for {there}")
            has_told = True
        time.sleep(_POLL_S)
