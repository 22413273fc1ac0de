"""A run and whoever watches it: where it stands, how it ended, and the request to stop. Imports next to nothing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever watches it."""

    step: int
    num_steps: int
    images_per_s: float  # over all workers
    loss: float
    seconds_left: float


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    seen: int  # samples whose step is done
    digest: str  # of their order, hexadecimal
    finished: bool  # False: stopped on request, to be resumed


@dataclass
class Hooks:
    """The run's connections to whoever started it. Rank 0's are used, where nothing else is said."""

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_message: Callable[[str], None] = lambda message: None
    stop_requested: Callable[[], bool] = lambda: False
    save_requested: Callable[[], bool] = lambda: False  # a machine will be taken away
    beat: Callable[[], None] = lambda: None  # every worker's: told that it is not stuck
    last_step: int | None = None  # where every worker pauses with a checkpoint; None: the run's end
