"""Rows over the workers that measure together."""

import torch
import torch.distributed as dist
from torch import Tensor

from gmdist.workers import all_sum, rank, world_size


def gathered(keys: Tensor, rows: Tensor) -> Tensor:
    """The rows of all workers in the order of their keys, so that it does not matter which worker had them.

    Args:
        keys: int64 [n], each worker's own; n may differ, and be 0.
        rows: [n, D].

    Returns:
        [N, D] on every worker.
    """
    if world_size() > 1:
        counts = torch.zeros(world_size(), dtype=torch.int64, device=keys.device)
        counts[rank()] = len(keys)
        counts = all_sum(counts)
        keys, rows = (_cat(value, counts.tolist()) for value in (keys, rows))
    return rows[keys.argsort()]


def _cat(value: Tensor, counts: list[int]) -> Tensor:
    """All workers' rows, one worker after the other; a collective takes parts of one size."""
    padded = value.new_zeros(max(counts), *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
