"""The moving average of 32 M weights on two workers: the time of an update at each ZeRO stage.

python benchmarks/ema.py
"""

import os
import socket
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

WORLD, UPDATES, ASKED_MS = 2, 50, 10.0
WIDTH, LAYERS = 2048, 8  # 33.6 M


def work(rank: int, port: int, stage: int, queue: Any) -> None:
    """One worker: the median time of an update, of the slower worker."""
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    from gmdist.families.family import Family
    from gmdist.train.ema import EMA
    from gmdist.train.engine import make_unit
    from gmdist.train.optim import OptimConfig

    class Model(Family):
        """Square layers."""

        averaged = ("network",)

        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    unit = make_unit(Model(), "network", OptimConfig(), stage=stage, precision="fp32", device=torch.device("cpu"))
    ema = EMA([unit], 500.0, 0.05)
    times = []
    for seen in range(0, 64 * UPDATES, 64):
        dist.barrier()
        start_s = time.perf_counter()
        ema.update(64, seen)
        times.append(time.perf_counter() - start_s)
    slower = torch.tensor(statistics.median(times))
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    if rank == 0:
        queue.put(slower.item() * 1e3)
    unit.close()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    print(f"| stage | an update (at most {ASKED_MS:.0f} ms) |\n|---|---|")
    for stage in (0, 1, 2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        queue = mp.get_context("spawn").Queue()
        context = mp.spawn(work, (port, stage, queue), nprocs=WORLD, join=False)
        print(f"| {stage} | {queue.get():.1f} ms |", flush=True)
        context.join()


if __name__ == "__main__":
    main()
