"""Several data sets in one order, by integer weights that are exact in every period."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from gmdist.data import tape
from gmdist.data.tape import Int64Array, Purpose, keyed_hash, permute
from gmdist.errors import DataError

UNPAIRED = "unpaired"  # where fingerprints have a second domain's


@dataclass(frozen=True)
class Fingerprint:
    """All that the order of a mix depends on."""

    weights: tuple[int, ...]
    tapes: tuple[tape.Fingerprint, ...]

    def check(self, saved: Mapping[str, object]) -> None:
        """Raise DataError if a run that was started with the `saved` fingerprint cannot go on with this one."""
        if UNPAIRED in saved:
            raise DataError(
                "cannot resume: data.unpaired named a second data set when the run was started and is null now; name "
                "it, or start anew in another run.dir"
            )
        weights, tapes = saved.get("weights"), saved.get("tapes")
        if not isinstance(weights, list | tuple) or not isinstance(tapes, list | tuple) or len(weights) != len(tapes):
            raise DataError("the checkpoint's data fingerprint is damaged, or was written by another version")
        if list(weights) != list(self.weights):
            was, now = (":".join(map(str, part)) for part in (weights, self.weights))
            raise DataError(
                f"cannot resume: the weights of data.mix were {was} when the run was started and are {now} now; set "
                "them as they were, or start anew in another run.dir"
            )
        for own, theirs in zip(self.tapes, tapes, strict=True):
            own.check(theirs)

    def to_dict(self) -> dict[str, object]:
        """As it is saved, for `check`."""
        return asdict(self)


class Mix:
    """Which data set each number of the order comes from, and which number it has there.

    With weights that add up to P, the numbers from k P to (k + 1) P hold exactly as many of each data set as its weight
    says, in an order that is drawn; each data set's own numbers come once each, in order. The arrangement comes again
    after `lanes` numbers, a multiple of P, and a data set has as many lanes of its own as it has places in there: so a
    lane is read at one place of each round, and where the workers divide the lanes, each reads lanes of its own.
    """

    def __init__(self, weights: Sequence[int], *, seed: int, lanes: int) -> None:
        """Arrange a round.

        Args:
            weights: of the data sets, each at least 1; only their ratios count.
            seed: draws the order within each period.
            lanes: of all data sets together, at least; with one data set exactly.
        """
        divisor = math.gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        period = sum(self.weights)
        periods = -(-lanes // period)
        self.lanes = tuple(weight * periods for weight in self.weights)  # of each data set
        slot = np.arange(period * periods)
        keys = keyed_hash(seed, Purpose.MIX, slot // period)
        place = permute(slot % period, np.full(len(slot), period), keys)
        self._dataset = np.searchsorted(np.cumsum(self.weights), place, side="right")  # by the slot in a round
        self._rank = np.empty_like(slot)  # among the slots of the same data set
        for dataset in range(len(weights)):
            here = self._dataset == dataset
            self._rank[here] = np.arange(np.count_nonzero(here))
        self._lanes = np.array(self.lanes)

    def split(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The data sets [N] of some numbers [N], and the numbers [N] that they have there."""
        if len(self.weights) == 1:
            return np.zeros_like(numbers), numbers
        rounds, slot = np.divmod(numbers, len(self._dataset))
        dataset = self._dataset[slot]
        return dataset, rounds * self._lanes[dataset] + self._rank[slot]
