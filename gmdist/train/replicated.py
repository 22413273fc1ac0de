"""Stage 0: every worker holds the whole child and its optimizer's state; one all-reduce of one flat tensor a step."""

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.train import optim
from gmdist.train.engine import Root, Unit, scaled
from gmdist.train.optim import OptimConfig
from gmdist.train.shards import FlatParameters, Fragment, elementwise_state
from gmdist.workers import rank, share, world_size


class ReplicatedUnit(Unit):
    """A unit without DeepSpeed."""

    def __init__(self, family: Family, name: str, config: OptimConfig, precision: str, device: torch.device) -> None:
        super().__init__(family, name, config)
        child = getattr(family, name)
        self._root = Root(child, precision, device)
        groups = optim.parameter_groups(child, name)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._flat = FlatParameters([group.named for group in groups], dtype, multiple_of=world_size())
        decays = [group.decays for group in groups]
        self._optimizer = optim.make_optimizer(
            config, [(d, [g]) for d, g in zip(decays, self._flat.groups, strict=True)]
        )
        optim.materialize_state(self._optimizer)
        share(self._flat.values)
        self._flat.publish()

    def _backward(self, phase: Phase, batch: Batch, seen: int, scale: float) -> Metrics:
        loss, metrics = self._root(phase.loss, batch, seen)
        scaled(loss, scale).backward()
        self._flat.collect()
        return metrics

    def step(self, lr: float) -> Tensor:
        gradients = self._flat.gradients
        if world_size() > 1:
            dist.all_reduce(gradients)
            gradients /= world_size()
        norm = torch.linalg.vector_norm(gradients)
        if self.config.clip_norm is not None:
            gradients *= torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        optim.step_unless(self._optimizer, ~norm.isfinite())
        self._flat.publish()
        gradients.zero_()
        return norm

    def held(self) -> list[Fragment]:
        return list(self._flat.fragments(self._states()))

    def owned(self) -> list[Fragment]:
        return list(self._flat.fragments(self._states(), *self._own_range()))

    def publish(self) -> None:
        if world_size() > 1:
            start, stop = self._own_range()
            parts = list(self._flat.values.chunk(world_size()))  # views
            dist.all_gather(parts, self._flat.values[start:stop].clone())
        self._flat.publish()

    def _own_range(self) -> tuple[int, int]:
        size = len(self._flat.values) // world_size()
        return rank() * size, (rank() + 1) * size

    def _states(self) -> list[dict[str, Tensor]]:
        return [elementwise_state(self._optimizer.state[group], group) for group in self._flat.groups]

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def close(self) -> None:
        del self._optimizer, self._flat
