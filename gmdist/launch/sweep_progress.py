"""What a person sees of a sweep: a table that is drawn anew on a terminal, a line for each event elsewhere."""

import threading
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gmdist.launch.sweep import Standing
from gmdist.report.sweep import shown


class SweepDisplay:
    """Shows the trials of one sweep; called from any thread. A context manager."""

    def __init__(self, name: str, metric: str) -> None:
        self._name, self._metric = name, metric
        self._console = Console(highlight=False, soft_wrap=True)
        self._standings: dict[int, Standing] = {}
        self._lock = threading.Lock()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "SweepDisplay":
        if self._live is not None:
            self._live.start()
        else:
            self.message("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def standing(self, standing: Standing) -> None:
        """Show where a trial stands."""
        with self._lock:
            before = self._standings.get(standing.stretch.trial)
            self._standings[standing.stretch.trial] = standing
            if self._live is not None:
                self._live.update(self._table(), refresh=True)
            elif before is None or (before.state, before.stretch) != (standing.state, standing.stretch):
                settings = ", ".join(f"{key}={value}" for key, value in shown(standing.stretch.settings).items())
                _, state, metric, speed = _cells(standing)
                speed = f", {speed} images/s" if speed else ""
                metric = f", {self._metric} {metric}" if metric else ""
                self.message(f"trial {standing.stretch.trial} ({settings}): {state}{metric}{speed}")

    def message(self, line: str) -> None:
        """Show a line that stays."""
        self._console.print(f"{self._name}: {line}", markup=False)

    def _table(self) -> Table:
        table = Table(title=Text(self._name))  # texts, as a string may hold what Rich takes for markup
        keys = list(next(iter(self._standings.values())).stretch.settings)
        for column in ("trial", *keys, "state", self._metric, "images/s"):
            table.add_column(Text(column))
        # A terminal shows the first rows of a long table: those that change.
        for _, standing in sorted(self._standings.items(), key=lambda item: (item[1].result is not None, item[0])):
            trial, *others = _cells(standing)
            table.add_row(*map(Text, (trial, *shown(standing.stretch.settings).values(), *others)))
        return table


def _cells(standing: Standing) -> tuple[str, str, str, str]:
    """Trial, state, metric and images/s, as they are shown."""
    stretch, progress, result = standing.stretch, standing.progress, standing.result
    state = standing.state
    if result is not None and result.error is not None:
        state = f"failed: {result.error}"
    elif result is not None:
        state = f"step {stretch.last_step}"
    elif progress is not None:
        state = f"training, step {progress.step} of {stretch.last_step}"
    metric = "" if result is None or result.metric is None else f"{result.metric:.5g}"
    speed = result.images_per_s if result is not None else progress.images_per_s if progress is not None else None
    return str(stretch.trial), state, metric, "" if speed is None else f"{speed:.0f}"
