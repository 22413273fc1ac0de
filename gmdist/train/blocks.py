"""How a network's blocks compute: compiled, kept or computed again in the backward, in which layout."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmdist.errors import ConfigError
from gmdist.families.family import Family, Phase
from gmdist.train.config import TrainConfig


def check_precision(family: Family, trained: list[str], precision: str) -> None:
    """ConfigError for a precision that a trained child cannot take."""
    for name in trained:
        for key, part in getattr(family, name).named_modules():
            if precision == "bf16" and isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
                raise ConfigError(
                    f"train.precision: bf16; the statistics of {name}.{key} stay fp32 and meet bf16 weights there: "
                    "take autocast"
                )


def prepare(family: Family, trained: list[str], config: TrainConfig) -> None:
    """Let the trained children compute as the config says; before their units are made."""
    check_precision(family, trained, config.precision)
    lay_out(family, trained, config)
    for child, block in _blocks(family, trained):
        if config.compile:
            block.forward = _compiled(child, block, block.forward)
        if config.activation_checkpointing:  # around what is compiled: telling which pass it is breaks a graph
            block.forward = functools.partial(_recomputed, child, block.forward)


def lay_out(family: Family, trained: list[str], config: TrainConfig) -> None:
    """Let the trained children compute in the config's layout, which rounds otherwise: in training and after it."""
    if config.channels_last:  # blocks too: features need not come of an image, a generator's begin as a parameter
        for module in (*(getattr(family, name) for name in trained), *(block for _, block in _blocks(family, trained))):
            module.register_forward_pre_hook(_to_channels_last, with_kwargs=True)


def _blocks(family: Family, trained: list[str]) -> list[tuple[str, nn.Module]]:
    """Each block after the name of its child."""
    return [
        (name, part) for name in trained for part in getattr(family, name).modules() if isinstance(part, family.blocks)
    ]


def _compiled(child: str, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's `forward` that is compiled while it trains, and always to the same code.

    A resumed run has not seen the shapes of an earlier preview or evaluation. So these are not compiled, a shape's code
    does not depend on those that came before it, and no kernel is chosen by its measured time.
    """
    # One count for all blocks of a class, each width of a UNet adds to it: past it, blocks stay as they are, unsaid.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    compiled = torch.compile(forward, dynamic=False, options={"deterministic": True})

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training and not _is_plain(child) else forward)(*args, **kwargs)

    return chosen


def _to_channels_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    def convert(value: Any) -> Any:
        is_image = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if is_image else value

    return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}


_phase: Phase | None = None  # whose loss is computed now, or differentiated
is_recomputing = False  # what was computed before, for a backward


@contextmanager
def computing_phase(phase: Phase) -> Iterator[None]:
    """Compute a phase's loss and its gradients, by plain blocks where the others are of no use."""
    global _phase
    _phase = phase
    try:
        yield
    finally:
        _phase = None


def _is_plain(child: str) -> bool:
    """Whether a child's blocks are neither compiled nor recomputed: gradients go through them twice, or are such."""
    return _phase is not None and (_phase.higher_order or (_phase.revisits and child != _phase.trains))


def _recomputed(child: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or _is_plain(child):
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(_telling, forward), *args, use_reentrant=False, **kwargs)


def _telling(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global is_recomputing
    is_recomputing = torch._C._current_graph_task_id() != -1
    try:
        return forward(*args, **kwargs)
    finally:
        is_recomputing = False
