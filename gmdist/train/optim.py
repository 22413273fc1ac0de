"""Optimizers by name, and the learning rate of each step."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmdist.checks import nonnegative, one_of
from gmdist.errors import ConfigError
from gmdist.families.family import Family, Phase

OPTIMIZERS = ("adamw", "adam", "adamax", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")


@dataclass
class OptimConfig:
    """How one child is optimized."""

    name: str = "adamw"  # adamw, adam, adamax or sgd
    lr: float = 1e-4  # after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # adamw, adam, adamax
    eps: float = 1e-8  # adamw, adam, adamax
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.0  # of matrices and kernels; norms, biases and embeddings never decay
    # constant; cosine, linear: from lr at the end of the warm-up to final_lr, which the step after the last would have;
    # inverse_sqrt: lr times the square root of warmup_steps / step
    schedule: str = "constant"
    final_lr: float = 0.0  # cosine, linear
    warmup_steps: int = 0  # linear from 0
    clip_norm: float | None = None  # largest norm of the child's whole gradient; None: not clipped

    def validate(self, key: str) -> None:
        """Raise ConfigError, its keys prefixed with `key`, for values that cannot be."""
        if problem := one_of(OPTIMIZERS, name=self.name) or one_of(SCHEDULES, schedule=self.schedule):
            raise ConfigError(f"{key}.{problem}")
        if not 0.0 < self.lr < math.inf:
            raise ConfigError(f"{key}.lr: {self.lr}; must be a number above 0")
        if not 0.0 < self.eps < math.inf:  # moments begin as zeros, and are divided by each other
            raise ConfigError(f"{key}.eps: {self.eps}; must be a number above 0")
        if problem := nonnegative(
            weight_decay=self.weight_decay, final_lr=self.final_lr, warmup_steps=self.warmup_steps
        ):
            raise ConfigError(f"{key}.{problem}")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{key}.{name}: {getattr(self, name)}; must be at least 0 and below 1")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ConfigError(f"{key}.clip_norm: {self.clip_norm}; must be above 0, or null for no clipping")


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of step number `step` (0 is the first) of a run of `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":  # Vaswani 2017, section 5.3, scaled to lr at the end of the warm-up
        return config.lr * math.sqrt(max(config.warmup_steps, 1) / (step + 1))
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.final_lr + (config.lr - config.final_lr) * remaining


def lazily(config: OptimConfig, phases: Sequence[Phase]) -> OptimConfig:
    """The optimizer of a child that these phases train: by several updates in a step as far as it says for one.

    A main phase and one at every k-th step are 1 + 1/k updates: Adam's learning rate is times k / (k + 1), and so is
    the exponent of what it remembers (Karras 2020, App. B, "Lazy regularization"). Others are left as they are.
    """
    share = 1.0 / sum(1.0 / phase.every for phase in phases)
    if config.name == "sgd" or share == 1.0:
        return config
    first, second = config.betas
    return dataclasses.replace(
        config, lr=config.lr * share, final_lr=config.final_lr * share, betas=(first**share, second**share)
    )


def trained_children(family: Family, optim: dict[str, OptimConfig]) -> list[str]:
    """The children that the phases train, each of which must have an optimizer, and no other may."""
    assert not list(family.parameters(recurse=False)), "a family's parameters live in its children"
    names = list(dict.fromkeys(phase.trains for phase in family.phases()))
    for name in names:
        if name not in optim:
            raise ConfigError(f"optim.{name}: missing; the family trains {', '.join(names)}")
    for name in optim:
        if name not in names:
            raise ConfigError(f"optim.{name}: no such child; the family trains {', '.join(names)}")
    assert set(family.averaged) <= set(names), "only trained children are averaged"
    return names


class Group(NamedTuple):
    """Parameters that are optimized alike."""

    decays: bool
    named: list[tuple[str, nn.Parameter]]


def parameter_groups(module: nn.Module, prefix: str) -> list[Group]:
    """A module's parameters: those that decay, then norms, biases and embeddings; no group is empty.

    A parameter decays if it has two dimensions or more and is no embedding: neither an `nn.Embedding`'s, nor named as
    one.

    Args:
        module: fp32.
        prefix: of the parameters' names.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    groups = [Group(True, []), Group(False, [])]
    for name, parameter in module.named_parameters():
        if parameter.numel() == 0:
            raise ConfigError(f"family: its parameter {prefix}.{name} has no elements")
        is_embedding = id(parameter) in embeddings or "embed" in name.rpartition(".")[2]
        groups[parameter.ndim < 2 or is_embedding].named.append((f"{prefix}.{name}", parameter))
    return [group for group in groups if group.named]


def make_optimizer(config: OptimConfig, groups: list[tuple[bool, list[nn.Parameter]]]) -> torch.optim.Optimizer:
    """The optimizer that the config names; its learning rate is set at every step.

    Args:
        config: of the child.
        groups: whether its parameters decay, and they.
    """
    settings = [{"params": group, "weight_decay": config.weight_decay * decays} for decays, group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, fused=True)
    if config.name == "adamax":
        return torch.optim.Adamax(settings, lr=config.lr, betas=config.betas, eps=config.eps)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def kept(config: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each weight. With the same, a run can go on from another's checkpoint."""
    if config.name == "sgd":
        return ("momentum",) if config.momentum else ()
    return ("mean", "largest") if config.name == "adamax" else ("mean", "square")


def step_unless(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Update the weights, or leave them and the optimizer's state as they are.

    Args:
        optimizer: of `make_optimizer`.
        is_bad: a bool on the device. A fused optimizer reads it there; for another the host waits for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined] # as torch.amp.GradScaler does
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif not is_bad.item():
        optimizer.step()


def materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state, zero as before the first update, so that it can be saved and loaded at any time.

    The state is made lazily by the first update: this makes one that changes nothing, and takes the count of updates
    back.
    """
    settings = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # as an L2 term, the decay would reach the state
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    set_num_updates(optimizer, 0)
    for group, (lr, weight_decay) in zip(optimizer.param_groups, settings, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates that bias corrections see; 0 for an optimizer without any."""
    return max((int(state["step"].item()) for state in optimizer.state.values() if "step" in state), default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Set the number of updates that bias corrections see."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)
