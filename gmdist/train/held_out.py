"""The family's own metrics on held-out samples: means over samples and workers."""

from collections.abc import Callable

import torch

from gmdist.families.family import Family
from gmdist.train.metrics import Averages
from gmdist.train.source import Source
from gmdist.workers import in_step, world_size

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
    spare = data.first(1) if data.num_samples < world_size() else None
    for part, is_own in in_step(data.sweep(batch_size), -(-most // batch_size), spare):
        batch = part.batch_on(device)
        averages.add(family.evaluate(batch), float(len(batch["key"])) if is_own else 0.0)
        beat()
    return family.summarize(averages.means())
