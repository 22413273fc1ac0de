"""The workers of a job, as torch.distributed knows them."""

import torch
import torch.distributed as dist

_MASK64 = (1 << 64) - 1


def world_size() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(number: int, device: torch.device) -> int:
    """The sum of all workers' numbers, modulo 2^64; every worker calls it."""
    number &= _MASK64
    if world_size() > 1:
        signed = torch.tensor([number - (1 << 64) if number >> 63 else number], device=device)
        dist.all_reduce(signed)
        number = int(signed.item()) & _MASK64
    return number
