"""How a run trains: how long, how precise, how often, and how fast."""

import math
from dataclasses import dataclass

from gmdist.errors import ConfigError, check_int64

PRECISIONS = ("fp32", "bf16", "autocast")
STAGES = (0, 1, 2, 3)
PROFILE_AFTER = 5  # steps: the first ones allocate and compile


# Of what evaluations find; of all else less is better, or neither.
LARGER_IS_BETTER = frozenset(
    {"precision", "recall", "class_coverage", "label_agreement", "psnr_db", "ssim", "elbo_nats", "iwae_nats"}
    | {"active_units", "used_codes"}
)


@dataclass
class TrainConfig:
    """How long, how precise, how often."""

    num_steps: int  # optimizer steps
    # fp32; autocast: products and convolutions in bf16 on fp32 weights; bf16: bf16 weights too, which fp32 ones stand
    # behind in the optimizer.
    precision: str = "fp32"
    zero_stage: int = 0  # 0: whole copies; 1: DeepSpeed shards optimizer state; 2: gradients too; 3: weights too
    offload_optimizer: bool = False  # the optimizer's state and updates on the host; stages 1 to 3
    # The networks' blocks by torch.compile, in training; stages 0 to 2, not where a loss differentiates a gradient.
    compile: bool = False
    activation_checkpointing: bool = False  # blocks are computed again in the backward instead of kept
    channels_last: bool = False  # convolutions' preferred layout on GPUs; after training too
    micro_batch_size: int | None = (
        None  # most samples that a worker passes through at once; None: its part of the batch
    )
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps; the last step is saved too
    keep_checkpoints: int | None = 2  # newest ones; None keeps all
    best_metric: str | None = None  # of the evaluation, as "test/l1": the checkpoint that is best by it stays too
    best_order: str = "min"  # min or max: which value of best_metric is best
    sample_every: int | None = 1000  # steps between sample grids; None: none
    num_preview_images: int = 40  # in a sample grid
    evaluate_every: int | None = None  # steps between evaluations on data.test; None: none
    ema_halflife_kimg: float = 500.0  # thousands of images after which an old weight counts half
    ema_ramp: float | None = 0.05  # the half-life is at most this share of the images seen; None: no bound
    rollback_after: int = 10  # updates in a row that are left out, as not finite, before the run goes back
    profile_steps: int | None = None  # steps that are traced, after the first few; None: none
    seed: int = 0  # of initial weights, noise and dropout

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision: '{self.precision}'; must be one of {', '.join(PRECISIONS)}")
        if self.zero_stage not in STAGES:
            raise ConfigError(f"train.zero_stage: {self.zero_stage}; must be 0, 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("train.offload_optimizer: true with train.zero_stage 0; it takes stage 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                "train.compile: true with train.zero_stage 3; DeepSpeed gathers weights between a block's layers, "
                "which cannot be compiled; take stage 0, 1 or 2"
            )
        for key in (
            "num_steps",
            "micro_batch_size",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "rollback_after",
            "num_preview_images",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}: {value}; must be at least 1")
        for key in ("sample_every", "evaluate_every", "profile_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}: {value}; must be at least 1, or null for never")
        if self.profile_steps is not None and self.num_steps <= PROFILE_AFTER:
            raise ConfigError(
                f"train.profile_steps: {self.profile_steps}; of a run of train.num_steps {self.num_steps} nothing is "
                f"traced: the first {PROFILE_AFTER} steps, which allocate and compile, are left out"
            )
        if self.best_order not in ("min", "max"):
            raise ConfigError(f"train.best_order: '{self.best_order}'; must be min or max")
        if self.best_metric is not None and (
            self.evaluate_every is None or self.checkpoint_every % self.evaluate_every != 0
        ):
            raise ConfigError(
                f"train.best_metric: '{self.best_metric}'; it needs an evaluation at each checkpoint: "
                "set train.evaluate_every to a divisor of train.checkpoint_every"
            )
        if not 0.0 < self.ema_halflife_kimg < math.inf:
            raise ConfigError(f"train.ema_halflife_kimg: {self.ema_halflife_kimg}; must be a number above 0")
        if self.ema_ramp is not None and not 0.0 < self.ema_ramp <= 1.0:
            raise ConfigError(f"train.ema_ramp: {self.ema_ramp}; must be above 0 and at most 1, or null for no bound")
        check_int64("train.seed", self.seed)


def micro_batch_size(config: TrainConfig, batch_size: int, num_workers: int, multiple_of: int = 1) -> int:
    """Samples that a worker passes through at once: the most that divide its part of the batch, within the config's.

    Where no such number is a multiple of what is asked for, as many as without that.
    ConfigError for workers that do not divide the batch.
    """
    part, rest = divmod(batch_size, num_workers)
    if rest:
        raise ConfigError(f"data.batch_size: {batch_size}; must be a multiple of the {num_workers} workers of the run")
    most = min(part, config.micro_batch_size or part)
    sizes = [size for size in range(most, 0, -1) if part % size == 0]
    return next((size for size in sizes if size % multiple_of == 0), sizes[0])
