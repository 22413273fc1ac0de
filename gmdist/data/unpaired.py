"""Two domains at once: of a second data set the sample of the same number comes along, in an order of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmdist.data import batch, mix
from gmdist.data.config import SECOND, DataConfig, MixedConfig
from gmdist.data.loader import Loader
from gmdist.data.mix import UNPAIRED
from gmdist.errors import DataError
from gmdist.rng import derive


@dataclass(frozen=True)
class Fingerprint:
    """All that the orders of both domains depend on."""

    first: mix.Fingerprint
    second: mix.Fingerprint

    def check(self, saved: Mapping[str, object]) -> None:
        """Raise DataError if a run that was started with the `saved` fingerprint cannot go on with this one."""
        own = dict(saved)
        theirs = own.pop(UNPAIRED, None)
        self.first.check(own)
        if not isinstance(theirs, Mapping):
            raise DataError(
                "cannot resume: data.unpaired was null when the run was started; set it to null, or start anew in "
                "another run.dir"
            )
        try:
            self.second.check(theirs)
        except DataError as error:  # data.seed and the like are the first domain's too, and would have been named there
            raise DataError(f"data.unpaired.train: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """As it is saved, for `check`."""
        return self.first.to_dict() | {UNPAIRED: self.second.to_dict()}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A worker's part of a batch of two domains, under the same numbers."""

    first: batch.Loaded
    second: batch.Loaded

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        """As that of the first domain, with image_b, and label_b where labels are read."""
        others = self.second.batch_on(device).items()
        named = {f"{name}{SECOND}": tensor for name, tensor in others if name != "key"}
        return self.first.batch_on(device) | named

    @property
    def digest(self) -> int:
        """The order digest of the samples of both: a sum over all."""
        return self.first.digest + self.second.digest

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """The samples that were replaced, each with its domain: "a" or "b"."""
        return [
            {"domain": domain, **line}
            for domain, loaded in (("a", self.first), ("b", self.second))
            for line in loaded.quarantined
        ]


class Unpaired:
    """Reads two data sets by the same numbers, each in an order that has nothing to do with the other's."""

    def __init__(
        self, config: DataConfig, data: str | list[MixedConfig], second: str, rank: int = 0, world_size: int = 1
    ) -> None:
        """Open both.

        Args:
            config: sizes and order. Threads and memory are shared out; max_bad_fraction is of each data set.
            data: the first domain, as for Loader.
            second: the folder of the second.
            rank, world_size: which numbers are this worker's.

        Raises:
            DataError: as Loader, of either.
        """
        memory_mib = max(1, config.prefetch_mib // 2)
        half = max(1, config.num_threads // 2)
        own = replace(config, prefetch_mib=memory_mib, num_threads=max(1, config.num_threads - half))
        # Shuffles, crops, flips and replacements all are keyed by the seed.
        other_seed = derive(config.seed, "data.unpaired", 0)
        other = replace(config, prefetch_mib=memory_mib, num_threads=half, seed=other_seed)
        self.first_domain = Loader(own, data, rank, world_size)
        self.second_domain = Loader(other, second, rank, world_size, beside=self.first_domain)
        self.fingerprint = Fingerprint(self.first_domain.fingerprint, self.second_domain.fingerprint)
        self.num_samples = max(self.first_domain.num_samples, self.second_domain.num_samples)
        self.max_bad = self.first_domain.max_bad + self.second_domain.max_bad

    def batches(self, start: int) -> Iterator[Loaded]:
        """This worker's part of one global batch after another, without end, from sample number `start` on."""
        yield from map(Loaded, self.first_domain.batches(start), self.second_domain.batches(start))

    def sweep(self, batch_size: int, count: int | None = None) -> Iterator[Loaded]:
        """Every sample of the larger domain once, shared among the workers; the last part may be smaller.

        The smaller one, of one data set, goes through its epochs meanwhile: none of its samples comes more than once
        more often than another. With a `count`, so many numbers at most, spread evenly over all.
        """
        parts = self.first_domain.swept(self.num_samples, batch_size, count)
        yield from map(Loaded, self.first_domain.numbered(parts), self.second_domain.numbered(parts))

    def first(self, count: int) -> Loaded:
        """The samples with the numbers 0 ... count - 1: the same on every worker."""
        return Loaded(self.first_domain.first(count), self.second_domain.first(count))

    def counters(self) -> dict[str, float]:
        """What reading from object storage has cost this process, for both domains together."""
        return self.first_domain.counters() or self.second_domain.counters()

    def notes(self) -> list[str]:
        """Lines that the user should read; each is given once."""
        return list(dict.fromkeys([*self.first_domain.notes(), *self.second_domain.notes()]))


def open_training(config: DataConfig, rank: int = 0, world_size: int = 1) -> Loader | Unpaired:
    """What a run is trained on, of one domain or two; DataError as Loader."""
    if config.unpaired is None:
        return Loader(config, config.trained_on, rank, world_size)
    return Unpaired(config, config.trained_on, config.unpaired.train, rank, world_size)


def open_held_out(config: DataConfig, rank: int = 0, world_size: int = 1) -> Loader | Unpaired | None:
    """What a run is evaluated on, of one domain or two; None: data.test is null. DataError as Loader.

    Nothing of it is kept in data.cache_dir: what is read now and then would take the place of what trains.
    """
    config = replace(config, cache_dir=None)
    if config.test is None:
        return None
    if config.unpaired is None or config.unpaired.test is None:
        return Loader(config, config.test, rank, world_size)
    return Unpaired(config, config.test, config.unpaired.test, rank, world_size)
