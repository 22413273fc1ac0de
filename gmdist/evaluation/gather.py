"""Sums and rows over the workers that measure together."""

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """This worker's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers, which all call this."""
    if place()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(keys: Tensor, rows: Tensor) -> Tensor:
    """The rows of all workers in the order of their keys, so that it does not matter which worker had them.

    Args:
        keys: int64 [n], each worker's own; n may differ, and be 0.
        rows: [n, D].

    Returns:
        [N, D] on every worker.
    """
    rank, size = place()
    if size > 1:
        counts = torch.zeros(size, dtype=torch.int64, device=keys.device)
        counts[rank] = len(keys)
        counts = summed(counts)
        keys, rows = (_cat(value, counts.tolist()) for value in (keys, rows))
    return rows[keys.argsort()]


def _cat(value: Tensor, counts: list[int]) -> Tensor:
    """All workers' rows, one worker after the other; a collective takes parts of one size."""
    padded = value.new_zeros(max(counts), *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
