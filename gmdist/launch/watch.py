"""What the driver looks out for while workers run: signals, and machines that come and go."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gmdist.config import Config
from gmdist.errors import EXIT_STOPPED
from gmdist.launch.cluster import free_room, leaving, room
from gmdist.launch.lease import folder_lost

_POLL_S = 0.25
_WATCHED_S = 2.0  # how often the cluster is looked at


class Stopper:
    """While installed, the first SIGINT or SIGTERM asks the workers to stop, the second ends the process at once.

    It is there before Ray is: an interrupt during Ray's own start would be swallowed.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.mailbox: Any = None  # of the workers that are running, if any
        self.lost: str | None = None  # the folder that another command has now
        self._asked = threading.Event()
        self._handed_on: str | None = None  # the last wish
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
            # Ray is in the middle of something, and would end with a complaint of its own.
            sys.stderr.write("gmdist: stopped\n")
            sys.stderr.flush()
            os._exit(EXIT_STOPPED)
        self.ask()
        if self.mailbox is None:  # nobody is there yet who would say it
            os.write(2, b"gmdist: stopping; once more to stop at once\n")  # no lock, as a stream has

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask for a stop. No more than that: a signal may have interrupted Ray, or a line that is being written."""
        self._asked.set()

    def lose(self, folder: str) -> None:
        """Ask for the end at once: the folder that workers would save into is another command's now."""
        self.lost = folder
        self._asked.set()

    def hand_on(self) -> None:
        """Tell the workers what was asked for, and the user; whoever watches workers calls it every now and then."""
        wish = None if not self.asked else "stop" if self.lost is None else "end"
        if wish == self._handed_on:
            return
        self._handed_on = wish
        if wish == "stop":
            self._on_message("stopping: running workers save a checkpoint first; once more to stop at once")
        if self.mailbox is not None:
            (self.mailbox.request_stop if wish == "stop" else self.mailbox.request_end).remote()

    def wait(self, seconds: float) -> None:
        """Wait, but not when a stop is asked for: as `check` then."""
        self._asked.wait(seconds)
        self.check()

    def check(self) -> None:
        """KeyboardInterrupt if a stop was asked for while no worker ran; FolderLostError if the folder is lost."""
        self.check_lost()
        if self.asked:
            raise KeyboardInterrupt

    def check_lost(self) -> None:
        """FolderLostError if another command has the folder now."""
        if self.lost is not None:
            raise folder_lost(self.lost)


class ClusterWatch:
    """What happens to the cluster while workers run: machines that will leave, and machines that have come."""

    def __init__(self, config: Config, size: int, mailbox: Any, on_message: Callable[[str], None]) -> None:
        self._config, self._size, self._mailbox, self._on_message = config, size, mailbox, on_message
        self._leaving: set[str] = set()
        self._next_look_s = 0.0
        self._has_asked = False

    def look(self, have_begun: bool) -> None:
        """Every now and then, ask the workers to save before a machine leaves, and to stop where more could run.

        Args:
            have_begun: whether the workers have taken their own room.
        """
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _WATCHED_S
        now = leaving()
        if now - self._leaving:
            self._on_message("a machine will be taken away: saving a checkpoint")
            self._mailbox.request_save.remote()
        self._leaving |= now
        larger = [size for size in self._config.cluster.sizes(self._config.data.batch_size) if size > self._size]
        if self._has_asked or not larger or not have_begun:
            return
        there = min(room(self._config.cluster), self._size + free_room(self._config.cluster))
        if there >= larger[0]:
            self._has_asked = True
            self._on_message(f"the cluster has room for {there} workers: saving a checkpoint, to go on with more")
            self._mailbox.request_stop.remote()


def choose_size(
    config: Config, before: int | None, refused: int | None, on_message: Callable[[str], None], stopper: Stopper
) -> int:
    """How many workers to start: the most that the cluster has room for; waits until there is room for the least.

    Args:
        config: of the run.
        before: how many there were.
        refused: how many there was no room for, since other jobs have it; None: not known.
        on_message: called with a line that the user should read.
        stopper: ends the waiting.
    """
    sizes = config.cluster.sizes(config.data.batch_size)
    sizes = [size for size in sizes if refused is None or size < refused] or sizes
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
        stopper.wait(_POLL_S)
