"""Two workers of one gloo job on this machine, without Ray, and a model of square layers for them."""

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gmdist.families.family import Family, Phase

WORLD, WIDTH = 2, 2048


class Square(Family):
    """Square layers, as many as make so many million parameters."""

    averaged = ("network",)

    def __init__(self, millions: float) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH) for _ in range(max(1, round(millions * 1e6 / WIDTH**2))))
        )

    def phases(self) -> list[Phase]:
        """None: its weights are not trained."""
        return []


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What function(rank, *arguments) returns on rank 0, of two workers of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(_enter, (port, queue, function, arguments), nprocs=WORLD, join=False)
    while queue.empty() and not context.join(timeout=0.1):  # which raises what a worker raises
        pass
    found = queue.get()
    context.join()
    return found


def _enter(rank: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = function(rank, *arguments)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()
