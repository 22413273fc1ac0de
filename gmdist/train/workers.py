"""The workers of a job, as torch.distributed knows them."""

import torch.distributed as dist


def world_size() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0
