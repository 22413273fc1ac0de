"""One optimizer = one engine: gradients, their mean over workers, the update. The only importer of deepspeed.

A unit trains one child of a family. Stage 0 keeps whole copies: torch's optimizer on one flat tensor, and one
all-reduce a step. Stages 1 and 2 are DeepSpeed's ZeRO: the optimizer's state, and with 2 the gradients, are sharded.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmdist.errors import ConfigError
from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.train.optim import OptimConfig, make_optimizer, materialize_state, set_num_updates
from gmdist.train.shards import FlatParameters, Fragment, elementwise_state

Loss = Callable[[Batch, int], tuple[Tensor, Metrics]]

PRECISIONS = ("fp32", "bf16")
STAGES = (0, 1, 2)
_BUCKET_ELEMENTS = 20_000_000  # each engine has its own buckets; DeepSpeed's default of 5e8 is 2 GB in fp32


def world_size() -> int:
    """Workers of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class Root(nn.Module):
    """What an engine wraps: the trained child, and the loss run inside `forward`.

    The loss calls plain networks, so it may go through them many times, differentiate gradients, and use other
    children, while the engine sees one forward.
    """

    def __init__(self, child: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.child = child
        self._device_type, self._bf16 = device.type, precision == "bf16"

    def forward(self, loss: Loss, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """A family's loss; in bf16, matrix products and convolutions compute in bf16 on fp32 weights."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return loss(batch, seen)


class Unit(ABC):
    """One trained child with its optimizer."""

    def __init__(self, family: Family, name: str, config: OptimConfig) -> None:
        self.family, self.name, self.config = family, name, config
        self.num_updates = 0

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
        metrics = self._backward(phase.loss, micro_batch, seen, scale * phase.every)
        return {f"{phase.name}/{key}": value for key, value in metrics.items()}

    def step(self, lr: float) -> None:
        """Average the gradients over workers, clip them, update the weights everywhere."""
        self.num_updates += 1
        self._step(lr)

    @abstractmethod
    def _backward(self, loss: Loss, batch: Batch, seen: int, scale: float) -> Metrics: ...

    @abstractmethod
    def _step(self, lr: float) -> None: ...

    @abstractmethod
    def held(self) -> list[Fragment]:
        """The fragments whose master weights and optimizer state this worker holds. Loading fills all of them."""

    @abstractmethod
    def owned(self) -> list[Fragment]:
        """The fragments that this worker answers for: over all workers, each element once."""

    @abstractmethod
    def publish(self) -> None:
        """Bring the owned fragments' values to the weights of every worker."""

    def set_num_updates(self, count: int) -> None:
        """Set the count of updates, in the optimizer's bias correction too."""
        self.num_updates = count
        set_num_updates(self._optimizer(), count)

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer: ...

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds."""


class ReplicatedUnit(Unit):
    """Stage 0: every worker holds the whole child and its optimizer's state."""

    def __init__(self, family: Family, name: str, config: OptimConfig, precision: str, device: torch.device) -> None:
        super().__init__(family, name, config)
        child = getattr(family, name)
        self._root = Root(child, precision, device)
        self._flat = FlatParameters(child, name, multiple_of=world_size())
        self.optimizer = make_optimizer(config, [self._flat.values])
        materialize_state(self.optimizer)
        self._flat.values.grad = self._flat.gradients
        if world_size() > 1:
            dist.broadcast(self._flat.values.data, src=0)

    def _backward(self, loss: Loss, batch: Batch, seen: int, scale: float) -> Metrics:
        value, metrics = self._root(loss, batch, seen)
        (value * scale).backward()
        return metrics

    def _step(self, lr: float) -> None:
        gradients = self._flat.gradients
        if world_size() > 1:
            dist.all_reduce(gradients)
            gradients /= world_size()
        if self.config.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradients)
            gradients *= torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        gradients.zero_()

    def held(self) -> list[Fragment]:
        return list(self._flat.fragments(self._state()))

    def owned(self) -> list[Fragment]:
        return list(self._flat.fragments(self._state(), *self._own_range()))

    def publish(self) -> None:
        if world_size() > 1:
            start, stop = self._own_range()
            parts = list(self._flat.values.data.chunk(world_size()))  # views
            dist.all_gather(parts, self._flat.values.data[start:stop].clone())

    def _own_range(self) -> tuple[int, int]:
        size = len(self._flat.values) // world_size()
        return rank() * size, (rank() + 1) * size

    def _state(self) -> dict[str, Tensor]:
        return elementwise_state(self.optimizer.state[self._flat.values], self._flat.values)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def close(self) -> None:
        del self.optimizer, self._flat


class ZeroUnit(Unit):
    """Stages 1 and 2: DeepSpeed shards the optimizer's state and master weights, stage 2 the gradients too."""

    def __init__(
        self, family: Family, name: str, config: OptimConfig, precision: str, device: torch.device, stage: int
    ) -> None:
        super().__init__(family, name, config)
        deepspeed = import_deepspeed(device)
        child = getattr(family, name)
        child.requires_grad_(True)  # hooks attach to what requires a gradient now
        self.engine, _, _, _ = deepspeed.initialize(
            model=Root(child, precision, device),
            optimizer=make_optimizer(config, list(child.parameters())),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only counted, and not used: the trainer owns the accumulation
                "managed_gradient_accumulation": False,
                "gradient_clipping": config.clip_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
                "zero_optimization": {
                    "stage": stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": _BUCKET_ELEMENTS,
                    "allgather_bucket_size": _BUCKET_ELEMENTS,
                },
            },
        )
        self._zero: Any = self.engine.optimizer
        materialize_state(self._zero.optimizer)

    def _backward(self, loss: Loss, batch: Batch, seen: int, scale: float) -> Metrics:
        value, metrics = self.engine(loss, batch, seen)
        self.engine.backward(value * scale, scale_wrt_gas=False)
        return metrics

    def _step(self, lr: float) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def held(self) -> list[Fragment]:
        fragments = []
        for name, parameter in getattr(self.family, self.name).named_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:  # wholly in other workers' partitions
                continue
            partition = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            place = mapping.hp_fragment_address
            state = elementwise_state(self._zero.optimizer.state[partition], partition)
            fragments.append(
                Fragment(
                    f"{self.name}.{name}",
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment.data,
                    {key: tensor.narrow(0, place.start, place.numel) for key, tensor in state.items()},
                )
            )
        return fragments

    def owned(self) -> list[Fragment]:
        return self.held()

    def publish(self) -> None:
        self._zero.update_lp_params()

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self._zero
        gc.collect()


def make_unit(
    family: Family, name: str, config: OptimConfig, *, stage: int, precision: str, device: torch.device
) -> Unit:
    """The unit that trains a family's child at a ZeRO stage."""
    if stage == 0:
        return ReplicatedUnit(family, name, config, precision, device)
    return ZeroUnit(family, name, config, precision, device, stage)


def freeze_all_but(family: Family, name: str) -> None:
    """Let gradients reach one child's parameters only.

    A phase that sends gradients through another trained child would otherwise leave them in its buffers.
    """
    for child_name, child in family.named_children():
        first = next(child.parameters(), None)
        if first is not None and first.requires_grad != (child_name == name):
            child.requires_grad_(child_name == name)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without its operator that is compiled at the first start."""
    import logging
    import os

    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("train.zero_stage: stages 1 and 2 need DeepSpeed (pip install deepspeed); use 0") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Its build takes half a minute, and one that is killed leaves a lock on which every later start hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed
