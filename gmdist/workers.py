"""The workers of a job, as torch.distributed knows them, and what they sum and gather; each of them calls it."""

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")
_MASK64 = (1 << 64) - 1


def world_size() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(number: int, device: torch.device) -> int:
    """The sum of all workers' numbers, modulo 2^64."""
    number &= _MASK64
    if world_size() > 1:
        signed = torch.tensor([number - (1 << 64) if number >> 63 else number], device=device)
        dist.all_reduce(signed)
        number = int(signed.item()) & _MASK64
    return number


def all_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers; the tensor itself where there is one."""
    if world_size() == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def all_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all workers; the tensor itself where there is one."""
    return all_sum(value) / world_size() if world_size() > 1 else value


def share(tensor: Tensor) -> None:
    """Give every worker the first one's values."""
    if world_size() > 1:
        values = tensor.detach().contiguous()  # a copy where the layout is another, as of channels last
        dist.broadcast(values, src=0)
        tensor.detach().copy_(values)


def all_gathered(value: Tensor) -> Tensor:
    """The tensors [N, ...] of all workers, one after the other; the tensor itself where there is one worker."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def all_gathered_objects(value: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """What each worker has, by rank; small Python objects, that are pickled by this job for itself.

    Args:
        value: this worker's.
        group: of all workers, for calls beside others of the default one.
    """
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def in_step(parts: Iterator[_T], rounds: int, spare: _T | None = None) -> Iterator[tuple[_T, bool]]:
    """A worker's parts, and whether they count.

    Every worker has as many: one that runs out repeats its last, or takes the spare one, since networks whose weights
    are shared out run on all workers together.
    """
    last = spare
    for _ in range(rounds):
        part = next(parts, None)
        last = last if part is None else part
        if last is not None:
            yield last, part is not None
