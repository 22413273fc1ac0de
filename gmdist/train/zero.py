"""Stages 1 to 3: DeepSpeed's ZeRO shards the optimizer's state, the gradients, the weights. The only importer of it."""

import gc
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.train import optim
from gmdist.train.engine import Root, Unit, scaled
from gmdist.train.optim import OptimConfig
from gmdist.train.shards import Fragment, elementwise_state
from gmdist.workers import rank, share, world_size

_BUCKET_ELEMENTS = 20_000_000  # each engine has its own buckets; DeepSpeed's default of 5e8 is 2 GB in fp32
_WHOLE_ELEMENTS = (
    10_000  # at stage 3, smaller parameters are not sharded: to gather them takes longer than they are worth
)
_KEPT = "gmdist"  # stands among the modules that use a parameter, so that DeepSpeed does not release it


class ZeroUnit(Unit):
    """Stages 1 and 2."""

    def __init__(
        self,
        family: Family,
        name: str,
        config: OptimConfig,
        precision: str,
        device: torch.device,
        stage: int,
        *,
        offload: bool,
    ) -> None:
        super().__init__(family, name, config)
        deepspeed = import_deepspeed(device)
        child = getattr(family, name)
        child.requires_grad_(True)  # hooks attach to what requires a gradient now
        for parameter in child.parameters():
            parameter.data = parameter.data.contiguous()
            share(parameter)
        self._is_offloaded = offload
        groups = optim.parameter_groups(child, name)
        buffers = {key: buffer.clone() for key, buffer in child.named_buffers()}
        weights = {key: parameter.data for key, parameter in child.named_parameters()} if precision == "bf16" else {}
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": _WHOLE_ELEMENTS,
        }
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type != "cpu"}
        with redirect_stdout(io.StringIO()), _without_broadcast():  # it prints how much memory there is
            self.engine, _, _, _ = deepspeed.initialize(
                model=Root(child, precision, device),
                optimizer=optim.make_optimizer(
                    config, [(group.decays, [p for _, p in group.named]) for group in groups]
                ),
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": 1,  # only counted: the trainer owns the accumulation
                    "managed_gradient_accumulation": False,
                    "gradient_clipping": config.clip_norm or 0.0,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,  # torch's own runs on the host too, and needs no compiler
                    "steps_per_print": None,
                    "bf16": {"enabled": precision == "bf16"},
                    "data_types": {"grad_accum_dtype": "fp32"},
                    "communication_data_type": "fp32",  # sums over workers as exact as those over micro-batches
                    "zero_optimization": zero,
                },
            )
        self._zero: Any = self.engine.optimizer
        self._hosts = dist.new_group(backend="gloo") if device.type != "cpu" else None
        self._parameters = dict(child.named_parameters())
        self._materialize_state()
        if precision == "bf16":  # DeepSpeed has rounded everything
            for key, buffer in buffers.items():
                owner, _, leaf = key.rpartition(".")
                child.get_submodule(owner)._buffers[leaf] = buffer
            for fragment in self.held():
                values = weights[fragment.name.removeprefix(f"{name}.")].flatten()
                fragment.values.copy_(values[fragment.start : fragment.start + len(fragment.values)])
            self.publish()

    def _materialize_state(self) -> None:
        optim.materialize_state(self._zero.optimizer)

    def _backward(self, phase: Phase, batch: Batch, seen: int, scale: float) -> Metrics:
        def loss_of_one_graph(batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
            loss, metrics = phase.loss(batch, seen)
            loss = scaled(loss, scale)
            return loss if self._graphs_agree(loss) else self._of_one_graph(loss, phase), metrics

        loss, metrics = self.engine(loss_of_one_graph, batch, seen)
        self.engine.backward(loss, scale_wrt_gas=False)
        return metrics

    def _graphs_agree(self, loss: Tensor) -> bool:
        """Whether the loss reaches the same parameters on every worker.

        Gradients are reduced in the order in which they come: where they differ, those of different parameters would be
        added to each other, without a word.
        """
        if world_size() == 1:
            return True
        found = reached(loss)
        counts = torch.tensor([float(p in found) for p in self._parameters.values()])
        # Waited for before the reductions, which would otherwise hang where the sizes differ; by the host alone.
        dist.all_reduce(counts, group=self._hosts)
        return not bool(((counts > 0) & (counts < world_size())).any())

    def _of_one_graph(self, loss: Tensor, phase: Phase) -> Tensor:
        """A loss of the same gradients, zero where there is none, and of the same graph on every worker."""
        parameters = list(self._parameters.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        products = [(p * (torch.zeros_like(p) if gradient is None else gradient)).sum() for p, gradient in pairs]
        return torch.stack(products).sum()

    def step(self, lr: float) -> Tensor:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = float("nan") if self._zero.overflow else self._zero._global_grad_norm
        if self._is_offloaded:
            self._forget_gradients()
        return torch.as_tensor(norm, dtype=torch.float32)

    def _forget_gradients(self) -> None:
        """Delete what DeepSpeed keeps on the host: what the next step does not reach would find it there."""
        for partition in self._partitions():
            if partition.grad is not None:
                partition.grad.zero_()
        for gradient in getattr(self._zero, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()
        self._zero.norm_for_param_grads.clear()
        for parameter in self._parameters.values():
            parameter.grad_accum = None

    def held(self) -> list[Fragment]:
        fragments = []
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is None:  # wholly in other workers' partitions
                continue
            partition = self._partitions()[mapping.param_group_index]
            place = mapping.hp_fragment_address
            fragments.append(
                self._fragment(name, mapping.lp_fragment_address.start, partition, place.start, place.numel)
            )
        return fragments

    def _partitions(self) -> list[Tensor]:
        """The master weights that this worker holds, flat, a group of the optimizer each."""
        if hasattr(self._zero, "fp32_partitioned_groups_flat"):  # stage 3
            return self._zero.fp32_partitioned_groups_flat
        if self._is_bf16_stage_1:
            return self._zero.fp32_groups_flat_partition
        return self._zero.single_partition_of_fp32_groups

    @property
    def _is_bf16_stage_1(self) -> bool:
        """Whether this is DeepSpeed's other class, that it has for stage 1 with bf16 alone."""
        return hasattr(self._zero, "fp32_groups_flat_partition")

    def _fragment(self, name: str, start: int, partition: Tensor, offset: int, count: int) -> Fragment:
        """Elements [offset, offset + count) of a partition, which are a parameter's from `start` on."""
        state = elementwise_state(self._zero.optimizer.state[partition], partition)
        return Fragment(
            f"{self.name}.{name}",
            start,
            partition.data.narrow(0, offset, count),
            {key: tensor.narrow(0, offset, count) for key, tensor in state.items()},
        )

    def owned(self) -> list[Fragment]:
        return self.held()

    def publish(self) -> None:
        zero = self._zero
        everyones = zero.bf16_partitioned_groups if self._is_bf16_stage_1 else zero.parallel_partitioned_bit16_groups
        for partitions, own in zip(everyones, self._partitions(), strict=True):
            partitions[rank()].data.copy_(own.data)
            # Between processors gloo's broadcasts take a quarter of the time of its all-gather, which DeepSpeed's
            # update_lp_params uses.
            for owner, partition in enumerate(partitions):
                dist.broadcast(partition.data, src=owner)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self._zero
        gc.collect()


class ShardedUnit(ZeroUnit):
    """Stage 3: a parameter's elements are shared out evenly among the workers, and gathered where a module uses it."""

    def _materialize_state(self) -> None:
        # DeepSpeed lends the optimizer one partition at a time, and takes it back after the update.
        groups = self._zero.optimizer.param_groups
        for group in groups:
            group["params"] = []
        for i, partition in enumerate(self._zero.fp32_partitioned_groups_flat):
            groups[self._zero.sub_group_to_group_id[i]]["params"].append(partition)
        super()._materialize_state()
        for group in groups:
            group["params"] = []

    def _backward(self, phase: Phase, batch: Batch, seen: int, scale: float) -> Metrics:
        if not (phase.higher_order or phase.revisits):
            return super()._backward(phase, batch, seen, scale)
        with self._gathered():  # a second backward would find the weights released
            return super()._backward(phase, batch, seen, scale)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        # Of every sharded child: the graph may lead through those that another unit trains.
        parameters: list[Any] = [p for p in self.family.parameters() if hasattr(p, "ds_active_sub_modules")]
        parameters[0].all_gather(parameters)
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_KEPT)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            parameters[0].partition(parameters, has_been_updated=False)

    def _of_one_graph(self, loss: Tensor, phase: Phase) -> Tensor:
        # The workers have gathered different weights, each in the place of the other's.
        raise RuntimeError(
            f"phase '{phase.name}': its loss reaches other weights on other workers, which train.zero_stage=3 cannot "
            "follow; take stage 0, 1 or 2"
        )

    def step(self, lr: float) -> Tensor:
        norm = super().step(lr)
        # A parameter that the next step does not reach would find this step's gradient there.
        self._zero.grad_partitions_flat_buffer.zero_()
        return norm

    def held(self) -> list[Fragment]:
        fragments = []
        for name, parameter in self._parameters.items():
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = rank() * size
            count = min(size, parameter.ds_numel - start)  # the last part may be filled up
            if count > 0:
                partition = self._zero.fp32_partitioned_groups_flat[group]
                fragments.append(self._fragment(name, start, partition, offset, count))
        return fragments

    def publish(self) -> None:
        self._zero._partition_all_parameters()
        for i in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(i)
        kept = self._zero.persistent_parameters  # small ones stay gathered
        if kept:
            kept[0].all_gather(kept)


def reached(loss: Tensor) -> set[Tensor]:
    """The parameters that a loss's graph ends in."""
    found, seen = set(), {loss.grad_fn}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(node.variable)
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        nodes += fresh
    return found


def make_zero_unit(
    family: Family, name: str, config: OptimConfig, precision: str, device: torch.device, stage: int, *, offload: bool
) -> Unit:
    """The unit of stage 1, 2 or 3; arguments as of `make_unit`."""
    scalars = [key for key, parameter in getattr(family, name).named_parameters() if parameter.ndim == 0]
    if stage == 3 and scalars:
        raise ConfigError(
            f"train.zero_stage: 3; it cannot share out the scalar parameter {name}.{scalars[0]}; take stage 0, 1 or 2"
        )
    kind = ShardedUnit if stage == 3 else ZeroUnit
    return kind(family, name, config, precision, device, stage, offload=offload)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without its operator that is compiled at the first start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("train.zero_stage: stages 1 to 3 need DeepSpeed (pip install deepspeed); use 0") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Its build takes half a minute, and one that is killed leaves a lock on which every later start hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _skip_compiler()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


@contextmanager
def _without_broadcast() -> Iterator[None]:
    """Leave out that DeepSpeed sends the weights to all workers: done before, and it cannot send scalars."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = original


def _skip_compiler() -> None:
    """Import an optimizer that is not used here, but that DeepSpeed looks at, without what compiles it: a second."""
    from deepspeed.runtime import compiler

    original, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = original
