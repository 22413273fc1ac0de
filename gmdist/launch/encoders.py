"""Encoding the shards of a latent cache: what each worker has to know."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gmdist import runs
from gmdist.config import Config
from gmdist.data.batch import as_floats
from gmdist.data.latent_shards import ShardEncoder
from gmdist.data.latents import Record
from gmdist.families.family import Family
from gmdist.launch.shard_workers import device_of, not_shared
from gmdist.train.engine import computing

_BATCH_SIZE = 32  # where the run has no micro-batch size


@dataclass(frozen=True)
class EncodingWork:
    """What a worker has to know."""

    config: Config  # the run's
    family: Family  # on the CPU
    destination: str
    record: Record

    def maker(self) -> ShardEncoder:
        """Set this process up to encode: its storage and its device."""
        config = self.config
        runs.use_storage(config)
        device = device_of(config)
        found = Record.load(self.destination)
        if found is None or self.record.difference(found) is not None:
            raise not_shared("DEST", self.destination)
        return ShardEncoder(
            config.data,
            encoding(self.family, config.train.precision, device),
            self.destination,
            flip=self.record.flip,
            batch_size=config.train.micro_batch_size or _BATCH_SIZE,
        )


def encoding(family: Family, precision: str, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    """Encodes pixels uint8 [N, H, W, C] on a device, as precisely as evaluations do; returns arrays on the CPU."""
    family = family.to(device)

    def call(pixels: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(), computing(precision, device) if precision == "bf16" else nullcontext():
            return {name: array.cpu() for name, array in family.encode(as_floats(pixels.to(device))).items()}

    return call
