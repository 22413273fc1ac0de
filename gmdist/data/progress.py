"""How far a command over a data set is: a line that moves on a terminal, a few lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY_S = 10.0


class Meter:
    """Shows how many bytes, or how many of something else, are done. A context manager."""

    def __init__(self, name: str, noun: str | None = None) -> None:
        """name: of what is worked at. noun: what is counted; None: bytes."""
        self._name, self._noun = name, noun
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        counts = (DownloadColumn(), TransferSpeedColumn()) if noun is None else (MofNCompleteColumn(),)
        columns = (BarColumn(), *counts, TimeRemainingColumn())
        self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self._console)
        self._task = self._bar.add_task(name, total=None)
        self._last_line_s = time.monotonic()

    def __enter__(self) -> "Meter":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that so many bytes of so many are done."""
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            counts = f"{decimal(done)} of {decimal(total)}" if self._noun is None else f"{done} of {total} {self._noun}"
            self.message(f"{self._name}: {counts}")

    def message(self, line: str) -> None:
        """Show a line that stays."""
        self._console.print(line, markup=False)
