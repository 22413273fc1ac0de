"""The family's own metrics on held-out samples: means over samples and workers."""

from collections.abc import Callable

import torch

from gmdist.families.family import Family
from gmdist.train.metrics import Averages
from gmdist.train.source import Source
from gmdist.workers import world_size

# What else is measured of a family with its averaged weights, in eval mode; every worker calls it, and tells the second
# argument now and then that it is not stuck.
Measure = Callable[[Family, Callable[[], None]], dict[str, float]]


@torch.no_grad()
def held_out_means(
    family: Family, data: Source, batch_size: int, device: torch.device, beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """What `Family.evaluate` finds, for every sample once, and `summarize` makes of it; every worker calls it.

    Args:
        family: in eval mode.
        data: its `sweep` is read.
        batch_size: samples at once.
        device: that the family is on.
        beat: called after each of them.
    """
    averages = Averages(device, finite_only=False)  # or weights that give NaN for most samples might look best
    most = -(-data.num_samples // world_size())  # that a worker has
    parts, batch = data.sweep(batch_size), None
    for _ in range(-(-most // batch_size)):
        part = next(parts, None)
        # A worker that runs out repeats its last: networks whose weights are shared out run on all together.
        if part is not None:
            batch = part.batch_on(device)
        elif batch is None:  # fewer samples than workers
            batch = data.first(1).batch_on(device)
        averages.add(family.evaluate(batch), 0.0 if part is None else float(len(batch["key"])))
        beat()
    return family.summarize(averages.means())
