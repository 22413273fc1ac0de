"""The contract of a family: what the trainer, the sampler and the evaluation know of a model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmdist.errors import ConfigError
from gmdist.interchange.pipelines import Network, Pipeline

# image: float32 [N, C, H, W] in [-1, 1]; label: int64 [N]; key: int64 [N], sample numbers; caption: uint8 [N, L], which
# `captions` reads, on the host; and the arrays that data.arrays asks for, [N, ...]. With data.unpaired, image_b and
# label_b too: of a second domain, whose samples have nothing to do with the first's beside them.
Batch = dict[str, Tensor]
DIRECTIONS = ("a2b", "b2a")  # of translations between the two
INITIALIZE_SAMPLES = 256  # that a family sees before its first step, where the data set has as many
Metrics = dict[str, Tensor]  # detached, scalars but in `evaluate`; they stay on the device until they are logged


@dataclass(frozen=True)
class Phase:
    """One optimizer update: the child it trains, the loss it follows, how often it runs."""

    name: str  # prefix of its metrics: "d_r1"
    trains: str  # direct child of the Family: one network, or a ModuleDict
    loss: Callable[[Batch, int], tuple[Tensor, Metrics]]  # (micro-batch, images seen) -> mean loss
    every: int = 1  # in steps; lazy regularisation: the loss is scaled by `every`
    higher_order: bool = False  # the loss differentiates a gradient
    # The loss itself differentiates, as an adaptive weight does: the backward goes a second time through children of
    # other phases, whose blocks are then neither compiled nor computed again.
    revisits: bool = False
    begins_at: int = 0  # images seen, from which on it runs
    changes_at: int = 0  # images seen, from which on the loss is another, that costs more

    def is_due(self, step: int, seen: int) -> bool:
        """Whether it runs in a step, before which so many images were seen."""
        return step % self.every == 0 and seen >= self.begins_at


@dataclass(frozen=True)
class Condition:
    """What samples are asked to show; None leaves it to the family."""

    label: Tensor | None = None  # int64 [N]
    prompts: tuple[str, ...] | None = None  # N texts


@dataclass(frozen=True)
class Surroundings:
    """What a family is told of the run it is built for, beside its own config."""

    image_size: int  # pixels a side
    image_channels: int
    num_classes: int  # 0 without labels
    seed: int  # of noise, timesteps and dropout
    open_run: Callable[[str], "Family"]  # another run's family with its averaged weights, in eval mode


class Family(nn.Module):
    """Networks, losses, sampler. Knows no engine and no optimizer; what it adds up over workers, `gmdist.workers` does.

    Children that a phase trains are trained; all others are frozen. Parameters live in children, and what optimizers
    must not touch (codebooks, statistics, scales) in buffers. Random numbers come from `gmdist.rng`, keyed by sample.
    Files of weights are read when it is built, or in `initialize`.
    """

    averaged: tuple[str, ...] = ()  # trained children that the EMA follows
    blocks: tuple[type[nn.Module], ...] = ()  # modules that are compiled, and computed again in the backward, as one
    inputs: tuple[str, ...] = ("image",)  # of a batch, that it cannot do without
    conditions: tuple[str, ...] = ()  # of "label" and "prompt": what samples can be asked for by
    compared: int = 1  # samples that a loss compares with each other: micro-batches are multiples of it
    cached: tuple[str, ...] = ()  # of `encode` of a first stage, any of which may be in a batch in place of its image

    def initialize(self, batch: Batch) -> None:
        """Set what depends on data: a latent's scale, actnorm. Once, at the start of a run.

        Every worker gets the same batch, the first `INITIALIZE_SAMPLES` of the data set.
        """

    def check_files(self) -> None:
        """ConfigError for files that `initialize` could not use. Before any worker starts, on the meta device."""

    def phases(self) -> list[Phase]:
        """The optimizer updates of one step, in order."""
        raise NotImplementedError

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] for int64 keys [N]: the same key gives the same image, but for rounding.

        ConfigError for a family that does not draw: a family that does has its own.
        """
        raise ConfigError("the run's family translates images, and draws none: use --translate")

    def complete(self, rows: Tensor, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images as `sample` gives them, whose first rows of pixels [N, C, R, W] in [-1, 1] are given.

        ConfigError for rows that nothing can be drawn below, or a family that cannot.
        """
        raise ConfigError("the run's family draws images as a whole, and completes none")

    def translate(self, image: Tensor, direction: str) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of one domain as they would be in the other; direction: one of DIRECTIONS.

        ConfigError for a family of one domain.
        """
        raise ConfigError("the run's family knows one domain, and translates no images")

    def preview(self, batch: Batch) -> Tensor:
        """One picture [N, C, H, W'] in [-1, 1] for each sample of the batch, for the grids made during training.

        Images beside their reconstructions, or samples of a family that does not reconstruct.
        """
        reconstruction = self.reconstruct(batch)
        if reconstruction is None:
            return self.sample(batch["key"])
        return torch.cat([batch["image"], reconstruction], dim=3)

    def reconstruct(self, batch: Batch) -> Tensor | None:
        """The batch's images through the model's bottleneck [N, C, H, W] in [-1, 1]; None for a family without one."""
        return None

    def latents(self, batch: Batch) -> Tensor | None:
        """Where the batch's images lie in a space that can be walked through [N, D]; None for a family without one."""
        return None

    def from_latents(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of places [N, D] there."""
        raise NotImplementedError

    def drawn_latents(self, keys: Tensor, condition: Condition | None = None) -> Tensor | None:
        """Where the samples of int64 keys [N] lie there, [N, D]; None for a family that draws in another way."""
        return None

    def between(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        """Places [N, D] on the way from one to the other, after a share of it in [0, 1]."""
        return torch.lerp(one, other, share)

    def mixed(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] with what is coarse of some places [N, D], and what is fine of others.

        ConfigError for a family whose latents are not layered so.
        """
        raise ConfigError("the run's family has no styles to mix")

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """What a second stage trains on, by name, [N, ...], of images [N, C, H, W] in [-1, 1].

        It needs averaged children and own buffers, and no other child. Empty for a family that encodes nothing.
        """
        return {}

    def evaluate(self, batch: Batch) -> Metrics:
        """Means over a batch of held-out samples: reconstruction error, bits a dimension, ELBO.

        Not scalars alone: what is a function of means over all samples is left to `summarize`.
        """
        return {}

    def summarize(self, means: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of an evaluation, of the means of what `evaluate` gave over all samples, on the host."""
        return {name: mean.item() for name, mean in means.items()}

    def concerns(self, found: Mapping[str, float]) -> list[str]:
        """What an evaluation's numbers should warn of, a line each: a posterior that collapsed, codes that died.

        A run that evaluates nothing held out asks at its end, with its last metrics, whose names are "phase/name".
        """
        return []

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """What each sample of a batch is worth to the model, by name, [N]: its log-likelihood, or a bound of it.

        In nats, larger for what looks like the training data. Empty for a family that has none.
        """
        return {}

    def for_diffusers(self) -> Network | Pipeline:
        """What diffusers loads in this family's place; ConfigError where it has nothing that gives the same."""
        raise ConfigError("diffusers has no such model")

    def after_step(self, seen: int) -> Metrics:
        """What follows an optimizer step: adaptive augmentation, codebook revival."""
        return {}

    def worker_state(self) -> dict[str, Tensor]:
        """State that differs between workers: a replay buffer."""
        return {}

    def load_worker_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `worker_state` gave."""


def between_gaussians(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Places [N, D] on a way on which normal vectors stay normal: half way between two, the mean would be too short."""
    return torch.lerp(one, other, share) / math.sqrt(share**2 + (1.0 - share) ** 2)


def captions(batch: Batch) -> list[str]:
    """The captions of a batch, N texts: UTF-8 that is padded with zeros."""
    return [row.tobytes().rstrip(b"\0").decode() for row in batch["caption"].numpy()]


def conditioned_labels(keys: Tensor, condition: Condition | None, num_classes: int) -> Tensor | None:
    """The label of each sample: the one asked for, or all classes in turn; None without classes. int64 [N]."""
    if num_classes == 0:
        return None
    if condition is not None and condition.label is not None:
        return condition.label
    return torch.remainder(keys, num_classes)
