"""The exponential moving average of the weights, on the fragments that each worker owns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gmdist.train.engine import Unit


def decay(batch_size: int, seen: int, halflife_kimg: float, ramp: float | None) -> float:
    """The weight that one step leaves to the average before it.

    Args:
        batch_size: samples of the step.
        seen: samples before the step.
        halflife_kimg: thousands of images after which an old weight counts half.
        ramp: the half-life is at most this share of the images seen (Karras 2020); None: no bound.
    """
    halflife = halflife_kimg * 1000.0
    if ramp is not None:
        halflife = min(halflife, (seen + batch_size) * ramp)
    return 0.5 ** (batch_size / max(halflife, 1e-8))


class EMA:
    """Averages of some units' weights; sharded as they are, so an update communicates nothing."""

    def __init__(self, units: list[Unit], halflife_kimg: float, ramp: float | None) -> None:
        self._units, self._halflife_kimg, self._ramp = units, halflife_kimg, ramp
        self.fragments = [fragment for unit in units for fragment in unit.owned()]
        self._masters = [fragment.values for fragment in self.fragments]
        self.averages = [values.clone() for values in self._masters]  # fp32, one for each fragment

    @torch.no_grad()
    def update(self, batch_size: int, seen: int) -> None:
        """Move towards the present weights, after a step of `batch_size` samples that `seen` came before."""
        if self.averages:
            weight = 1.0 - decay(batch_size, seen, self._halflife_kimg, self._ramp)
            torch._foreach_lerp_(self.averages, self._masters, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, on every worker; afterwards the weights are back, bit by bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.averages, self._masters, strict=True):
            kept: Tensor = master.clone()
            master.copy_(average)
            average.copy_(kept)
        for unit in self._units:
            unit.publish()
