"""Saving and loading beside DeepSpeed's own, as models grow: two workers, ZeRO stage 2, bf16, in one process tree.

    python benchmarks/checkpoint.py

Printed are how long a step waits for a save, until it is on the disk, the size, and how long loading takes (with the
check of every byte), against `save_checkpoint` and `load_checkpoint` of the same engine. What is read is in the page
cache for both. Medians of some rounds, of the slower worker.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pair
import torch
import torch.distributed as dist

from gmdist.train import checkpoint
from gmdist.train.checkpoint import Reader
from gmdist.train.ema import EMA
from gmdist.train.engine import make_unit
from gmdist.train.optim import OptimConfig
from gmdist.train.saver import Saver
from gmdist.train.state import load_state, shapes_of, state_tensors

ROUNDS = 3
MILLIONS = (10, 50, 200, 400)
PEER_UP_TO = 200  # millions: what it reads beside does not fit into 24 GiB after that
ASKED_AT, WAIT_S, LOAD_RATIO = 200, 0.4, 0.5
# What a run says of a checkpoint, beside the shapes of its tensors.
META: dict[str, Any] = {
    "family": "square",
    "images": 0,
    "cursor": 0,
    "left_out": [],
    "skips": {"total": 0, "in_a_row": 0, "since": 0},
    "averages": [],
    "flops": {},
    "batch_size": pair.WORLD,
    "order_digest": "0" * 16,
    "evaluation": {},
    "data": {},
    "train_seed": 0,
    "world_size": pair.WORLD,
    "updates": {"network": 0},
    "worker_shapes": {},
}


def num_bytes(folder: str) -> int:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def work(rank: int, millions: int, folder: str) -> dict[str, float]:
    """One worker: the medians over the rounds."""
    family = pair.Square(millions)
    shapes = shapes_of(family)
    unit = make_unit(family, "network", OptimConfig(), stage=2, precision="bf16", device=torch.device("cpu"))
    units = {"network": unit}
    ema = EMA(list(units.values()), 500.0, 0.05)
    saver = Saver(folder, keep=1)
    saver.prepare(state_tensors(family, units, ema))
    times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        dist.barrier()
        start_s = time.perf_counter()
        yield
        taken = torch.tensor(time.perf_counter() - start_s, dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        times[name].append(taken.item())

    for number in range(1, ROUNDS + 1):
        meta = META | {"shapes": shapes}
        saver.wait()
        with timed("written"):
            with timed("waited"):
                saver.save(number, state_tensors(family, units, ema), meta)
            saver.wait()
        dist.barrier()
        with timed("loaded"):
            choice: list[Any] = [checkpoint.find_newest(folder)[0] if rank == 0 else None]
            dist.broadcast_object_list(choice, src=0)
            with Reader(choice[0].location, choice[0].meta) as reader:
                load_state(reader, family, units, ema)
        times["bytes"].append(num_bytes(f"{folder}/checkpoints"))
        if millions > PEER_UP_TO:
            continue
        own = f"{folder}/deepspeed"
        with timed("peer written"):
            unit.engine.save_checkpoint(own, tag=str(number))
        with timed("peer loaded"):
            unit.engine.load_checkpoint(own, tag=str(number))
        if rank == 0:
            times["peer bytes"].append(num_bytes(own))
            shutil.rmtree(own)
    saver.close()
    unit.close()
    return {name: statistics.median(values) for name, values in times.items()}


def measure(millions: int, scratch: str) -> dict[str, float]:
    """The medians for a model of so many million parameters."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return pair.run(work, millions, folder)


def row(found: dict[str, float], whose: str) -> list[str]:
    """Three columns of the table."""
    return [
        f"{found[whose + 'written']:.1f} s",
        f"{found[whose + 'bytes'] / 1e9:.2f} GB",
        f"{found[whose + 'loaded']:.2f} s",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints are written")
    parser.add_argument("--millions", type=int, nargs="+", default=MILLIONS, help="of parameters")
    options = parser.parse_args()
    # As Ray's workers have it: large temporaries come from the heap and stay there.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000", OMP_NUM_THREADS="1")
    print("| parameters | a step waits | written | size | loaded | DeepSpeed: written | size | loaded |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    at_asked: dict[str, float] = {}
    for millions in options.millions:
        found = measure(millions, options.folder)
        columns = [f"{found['waited']:.2f} s", *row(found, "")]
        columns += row(found, "peer ") if "peer bytes" in found else ["-"] * 3
        print(f"| {millions} M | {' | '.join(columns)} |", flush=True)
        if millions == ASKED_AT:
            at_asked = found
    if not at_asked:
        return
    ratio = at_asked["loaded"] / at_asked["peer loaded"]
    print(f"at {ASKED_AT} M a step waits {at_asked['waited']:.2f} s (asked for: {WAIT_S});", end=" ")
    print(f"loading takes {ratio:.2f} of DeepSpeed's time (asked for: {LOAD_RATIO})")


if __name__ == "__main__":
    main()
