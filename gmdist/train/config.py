"""How a run trains: how long, how precise, how often."""

import math
from dataclasses import dataclass

from gmdist.errors import ConfigError, check_int64
from gmdist.train.engine import PRECISIONS, STAGES


@dataclass
class TrainConfig:
    """How long, how precise, how often."""

    num_steps: int  # optimizer steps
    precision: str = "fp32"  # fp32, or bf16: products and convolutions in bf16 on fp32 weights
    zero_stage: int = 0  # 0: whole copies; 1: DeepSpeed shards optimizer state; 2: gradients too
    micro_batch_size: int | None = None  # samples a worker passes through at once; None: its whole part of the batch
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps; the last step is saved too
    keep_checkpoints: int | None = 2  # newest ones; None keeps all
    sample_every: int | None = 1000  # steps between sample grids; None: none
    num_preview_images: int = 40  # in a sample grid
    evaluate_every: int | None = None  # steps between evaluations on data.test; None: none
    ema_halflife_kimg: float = 500.0  # thousands of images after which an old weight counts half
    ema_ramp: float | None = 0.05  # the half-life is at most this share of the images seen; None: no bound
    seed: int = 0  # of initial weights, noise and dropout

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision: '{self.precision}'; must be one of {', '.join(PRECISIONS)}")
        if self.zero_stage == 3:
            raise ConfigError(
                "train.zero_stage: 3; parameters that are sharded themselves are not supported yet; use 0, 1 or 2"
            )
        if self.zero_stage not in STAGES:
            raise ConfigError(f"train.zero_stage: {self.zero_stage}; must be 0, 1 or 2")
        for key in ("num_steps", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}: {value}; must be at least 1")
        for key in ("sample_every", "evaluate_every", "num_preview_images"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}: {value}; must be at least 1, or null for never")
        if not 0.0 < self.ema_halflife_kimg < math.inf:
            raise ConfigError(f"train.ema_halflife_kimg: {self.ema_halflife_kimg}; must be a number above 0")
        if self.ema_ramp is not None and not 0.0 < self.ema_ramp <= 1.0:
            raise ConfigError(f"train.ema_ramp: {self.ema_ramp}; must be above 0 and at most 1, or null for no bound")
        check_int64("train.seed", self.seed)


def micro_batch_size(config: TrainConfig, batch_size: int, num_workers: int) -> int:
    """Samples that a worker passes through at once; ConfigError if the sizes do not divide."""
    if batch_size % num_workers:
        raise ConfigError(
            f"data.batch_size: {batch_size}; {num_workers} workers do not divide it; "
            f"use a multiple of {num_workers}, or another cluster.num_workers"
        )
    part = batch_size // num_workers
    micro = config.micro_batch_size or part
    if part % micro:
        raise ConfigError(
            f"train.micro_batch_size: {micro}; it must divide a worker's part of the batch, which is {part} "
            f"(data.batch_size {batch_size} / {num_workers} workers)"
        )
    return micro
