"""Taking a sweep through its stretches: which run side by side, and in which order their results count."""

import heapq
from collections.abc import Callable

from gmdist.sweep.schedulers import next_stretch
from gmdist.sweep.trials import Finished, History, Plan, Result, Stretch


def drive(plan: Plan, width: int, start: Callable[[Stretch], Callable[[], Result]]) -> list[Finished]:
    """All stretches of a sweep, in the order in which their results were taken in.

    Results count in the order in which they would come if every step of every trial took the same time. So the sweep
    does not depend on which machine was faster, or on where the command was killed: what ended before is given back at
    once, and the same decisions follow.

    Args:
        plan: of the sweep.
        width: stretches under way at once.
        start: begins a stretch, and gives what waits for its result.
    """
    finished: list[Finished] = []
    running: list[tuple[int, int, Stretch, Callable[[], Result]]] = []  # the time at which it ends, in steps
    now = 0
    while True:
        while len(running) < width:
            stretch = next_stretch(plan, History(finished, [stretch for _, _, stretch, _ in running]))
            if stretch is None:
                break
            order = len(finished) + len(running)
            heapq.heappush(running, (now + stretch.num_steps, order, stretch, start(stretch)))
        if not running:
            return finished
        now, _, stretch, wait = heapq.heappop(running)
        finished.append(Finished(stretch, wait()))
