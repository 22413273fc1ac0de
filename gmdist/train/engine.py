"""One trained child = one optimizer = one unit: what the trainer asks of it, at every ZeRO stage.

Stage 0 keeps whole copies (`replicated.py`), stages 1 to 3 are DeepSpeed's (`zero.py`): the optimizer's state is
sharded, with 2 the gradients too, with 3 the weights too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.train.blocks import computing_phase
from gmdist.train.optim import OptimConfig, num_updates, set_num_updates
from gmdist.train.shards import Fragment

Loss = Callable[[Batch, int], tuple[Tensor, Metrics]]


def computing(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """How networks compute: in bf16 and autocast, matrix products and convolutions in bf16."""
    # With bf16 weights too: inputs come in fp32, and norms and sums are to be computed in it.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


class Root(nn.Module):
    """What an engine wraps: the trained child, and the loss run inside `forward`.

    The loss calls plain networks, so it may go through them many times, differentiate gradients, and use other
    children, while the engine sees one forward.
    """

    def __init__(self, child: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.child = child
        self._precision, self._device = precision, device

    def forward(self, loss: Loss, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """A family's loss."""
        with computing(self._precision, self._device):
            return loss(batch, seen)


class Unit(ABC):
    """One trained child with its optimizer."""

    def __init__(self, family: Family, name: str, config: OptimConfig) -> None:
        self.family, self.name, self.config = family, name, config

    def accumulate(self, phase: Phase, micro_batch: Batch, seen: int, scale: float) -> Metrics:
        """Add one micro-batch's gradient of a phase's loss.

        Args:
            phase: it trains this unit's child.
            micro_batch: this worker's.
            seen: samples whose step is done, over all workers.
            scale: of the loss: 1 / number of micro-batches.

        Returns:
            The loss's metrics, prefixed with the phase's name.
        """
        freeze_all_but(self.family, self.name)
        with computing_phase(phase):
            metrics = self._backward(phase, micro_batch, seen, scale * phase.every)
        return {f"{phase.name}/{key}": value for key, value in metrics.items()}

    @abstractmethod
    def _backward(self, phase: Phase, batch: Batch, seen: int, scale: float) -> Metrics: ...

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Average the gradients over workers, clip them, update the weights everywhere.

        Returns:
            The norm of the mean gradient before it was clipped, a scalar on the device. Where it is not finite, the
            update was left out on all workers.
        """

    @abstractmethod
    def held(self) -> list[Fragment]:
        """The fragments whose master weights and optimizer state this worker holds. Loading fills all of them."""

    @abstractmethod
    def owned(self) -> list[Fragment]:
        """The fragments that this worker answers for: over all workers, each element once."""

    @abstractmethod
    def publish(self) -> None:
        """Bring the owned fragments' values to the weights of every worker."""

    @property
    def num_updates(self) -> int:
        """Updates done, as bias corrections see them."""
        return num_updates(self._torch_optimizer())

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        set_num_updates(self._torch_optimizer(), count)

    @abstractmethod
    def _torch_optimizer(self) -> torch.optim.Optimizer: ...

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds."""


def scaled(loss: Tensor, scale: float) -> Tensor:
    """A loss times `scale`. One that is not finite makes all its gradients NaN, so that no worker steps."""
    value = loss.detach()
    return loss * (scale + (value - value))


def make_unit(
    family: Family,
    name: str,
    config: OptimConfig,
    *,
    stage: int,
    precision: str,
    device: torch.device,
    offload: bool = False,
) -> Unit:
    """The unit that trains a family's child.

    Args:
        family: all its parameters fp32.
        name: of the child.
        config: of its optimizer.
        stage: of ZeRO.
        precision: one of PRECISIONS.
        device: that computes.
        offload: whether the optimizer's state is in host memory; not at stage 0.
    """
    if stage == 0:
        from gmdist.train.replicated import ReplicatedUnit

        return ReplicatedUnit(family, name, config, precision, device)
    from gmdist.train.zero import make_zero_unit

    return make_zero_unit(family, name, config, precision, device, stage, offload=offload)


def freeze_all_but(family: Family, name: str) -> None:
    """Let gradients reach one child's parameters only.

    A phase that sends gradients through another trained child would otherwise leave them in its buffers.
    """
    for child_name, child in family.named_children():
        first = next(child.parameters(), None)
        if first is not None and first.requires_grad != (child_name == name):
            child.requires_grad_(child_name == name)
