"""The whole state of a run as named tensors, and back: what a checkpoint holds, and what it must agree with."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gmdist.errors import CheckpointError, DataError
from gmdist.families.family import Family
from gmdist.train import checkpoint
from gmdist.train.checkpoint import BUFFER, EMA_PARAM, FROZEN, PARAM, STATE, WORKER, Reader, check_shapes, tensor_key
from gmdist.train.ema import EMA
from gmdist.train.engine import Unit
from gmdist.workers import rank, share, world_size


class Fingerprint(Protocol):
    """What the order of samples depends on."""

    def check(self, saved: dict[str, Any]) -> None:
        """Raise DataError if a run with the saved fingerprint cannot go on with this one."""

    def to_dict(self) -> dict[str, Any]:
        """As it is saved."""


@dataclass
class RunIdentity:
    """What a checkpoint must agree with to be resumed from."""

    family: str
    batch_size: int  # samples a step, over all workers
    order: Fingerprint | None = None  # of the samples; None: of no data set


def state_tensors(family: Family, units: Mapping[str, Unit], ema: EMA) -> dict[str, Tensor]:
    """This worker's part of the state, 1-D tensors by `tensor_key`. Over all workers it holds every element once."""
    tensors: dict[str, Tensor] = {}
    for unit in units.values():
        for fragment in unit.owned():
            tensors[tensor_key(PARAM, fragment.name, fragment.start)] = fragment.values
            for name, values in fragment.state.items():
                tensors[tensor_key(STATE + name, fragment.name, fragment.start)] = values
    for fragment, average in zip(ema.fragments, ema.averages, strict=True):
        tensors[tensor_key(EMA_PARAM, fragment.name, fragment.start)] = average
    for i, (name, parameter) in enumerate(_frozen_parameters(family, units)):
        if i % world_size() == rank():
            tensors[tensor_key(FROZEN, name, 0)] = parameter.data.flatten()
    if rank() == 0:
        for name, buffer in family.named_buffers():
            tensors[tensor_key(BUFFER, name, 0)] = buffer.flatten()
    for name, state in family.worker_state().items():
        tensors[tensor_key(WORKER, f"{name}@{rank()}", 0)] = state.flatten()
    return tensors


@torch.no_grad()
def load_state(reader: Reader, family: Family, units: Mapping[str, Unit], ema: EMA) -> None:
    """Fill a family, its optimizers and its averages from a checkpoint of any number of workers and any ZeRO stage."""
    for name, unit in units.items():
        for fragment in unit.held():
            reader.read(PARAM, fragment.name, fragment.start, fragment.values)
            for key, values in fragment.state.items():
                if not reader.has(STATE + key, fragment.name):
                    raise CheckpointError(
                        f"{reader.location}: has no '{key}' of {fragment.name}, it was trained with another optimizer; "
                        f"set optim.{name}.name as it was, or choose another run.dir"
                    )
                reader.read(STATE + key, fragment.name, fragment.start, values)
        if name not in reader.meta["updates"]:
            raise CheckpointError(f"{reader.location}: damaged (it does not say how many updates {name} has had)")
        unit.num_updates = reader.meta["updates"][name]
        unit.publish()
    for fragment, average in zip(ema.fragments, ema.averages, strict=True):
        reader.read(EMA_PARAM, fragment.name, fragment.start, average)
    for name, parameter in _frozen_parameters(family, units):
        load_tensor(reader, FROZEN, name, parameter.data)
    for name, buffer in family.named_buffers():
        load_tensor(reader, BUFFER, name, buffer)
    if rank() < reader.meta["world_size"]:  # a worker that was not there before starts with the family's own
        _load_worker_state(reader, family)


def _load_worker_state(reader: Reader, family: Family) -> None:
    check_shapes(reader.location, reader.meta["worker_shapes"], worker_shapes_of(family))
    state = family.worker_state()
    for name, tensor in state.items():
        load_tensor(reader, WORKER, f"{name}@{rank()}", tensor)
    family.load_worker_state(state)


def share_frozen(family: Family, trained: Collection[str]) -> None:
    """Give all workers the same of what no engine does: another run may have saved while they opened it."""
    for _, parameter in _frozen_parameters(family, trained):
        share(parameter)
    for buffer in family.buffers():
        share(buffer)


def _frozen_parameters(family: Family, trained: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in family.named_parameters() if name.partition(".")[0] not in trained]


def worker_shapes_of(family: Family) -> dict[str, list[int]]:
    """The shapes of what each worker of a family has for itself."""
    return {name: list(tensor.shape) for name, tensor in family.worker_state().items()}


def shapes_of(family: Family) -> dict[str, list[int]]:
    """The shapes of a family's parameters and buffers."""
    tensors: list[tuple[str, Tensor]] = [*family.named_parameters(), *family.named_buffers()]
    return {name: list(tensor.shape) for name, tensor in tensors}


def load_tensor(reader: Reader, kind: str, name: str, tensor: Tensor) -> None:
    """Fill a tensor from a checkpoint."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    reader.read(kind, name, 0, flat)
    tensor.copy_(flat.view(tensor.shape))


def check_identity(found: checkpoint.Found, identity: RunIdentity, seed: int) -> None:
    """Raise if a run cannot go on from a checkpoint: another family, data set, seed or batch size."""
    meta = found.meta
    if meta["family"] != identity.family:
        raise CheckpointError(
            f"{found.location}: of family '{meta['family']}', the config's is '{identity.family}'; "
            "choose another run.dir, or set run.overwrite=true to start anew"
        )
    if identity.order is not None:
        identity.order.check(meta["data"])
    for key, saved, now in (
        ("train.seed", meta["train_seed"], seed),
        ("data.batch_size", meta["batch_size"], identity.batch_size),
    ):
        if saved != now:
            raise DataError(
                f"cannot resume: {key} was {saved} when the run was started and is {now} now; "
                f"set {key}={saved}, or start anew in another run.dir"
            )
