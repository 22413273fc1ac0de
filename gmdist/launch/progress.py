"""What a person sees of a run while it trains: one line that moves on a terminal, a few lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from gmdist.train.hooks import Progress

_LINE_EVERY_S = 10.0


class Display:
    """Shows the progress of one run. A context manager."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._last_line_s = 0.0
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None, status="starting")
        else:
            print(f"{self._name}: starting", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, progress: Progress) -> None:
        """Show where the run stands."""
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        left = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
        status = (
            f"step {progress.step}/{progress.num_steps}, loss {progress.loss:.4f}, "
            f"{progress.images_per_s:.0f} images/s, {left} left"
        )
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, total=progress.num_steps, completed=progress.step, status=status)
        elif time.monotonic() - self._last_line_s >= _LINE_EVERY_S or progress.step == progress.num_steps:
            self._last_line_s = time.monotonic()
            print(f"{self._name}: {status}", flush=True)

    def message(self, line: str) -> None:
        """Show a line that stays."""
        self._console.print(f"{self._name}: {line}", markup=False)
