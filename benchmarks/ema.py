"""The moving average of 32 M weights on two workers: the time of an update at each ZeRO stage.

python benchmarks/ema.py
"""

import statistics
import time

import pair
import torch
import torch.distributed as dist

from gmdist.train.ema import EMA
from gmdist.train.engine import make_unit
from gmdist.train.optim import OptimConfig

MILLIONS, UPDATES, ASKED_MS = 33.6, 50, 10.0


def work(rank: int, stage: int) -> float:
    """One worker: the median time of an update, of the slower worker, in milliseconds."""
    family = pair.Square(MILLIONS)
    unit = make_unit(family, "network", OptimConfig(), stage=stage, precision="fp32", device=torch.device("cpu"))
    ema = EMA([unit], 500.0, 0.05)
    times = []
    for seen in range(0, 64 * UPDATES, 64):
        dist.barrier()
        start_s = time.perf_counter()
        ema.update(64, seen)
        times.append(time.perf_counter() - start_s)
    slower = torch.tensor(statistics.median(times))
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    unit.close()
    return slower.item() * 1e3


def main() -> None:
    """Print the table."""
    print(f"| stage | an update (at most {ASKED_MS:.0f} ms) |\n|---|---|")
    for stage in (0, 1, 2, 3):
        print(f"| {stage} | {pair.run(work, stage):.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
