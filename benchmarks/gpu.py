"""One GPU: the trainer's step beside a plain torch loop's, in every precision, with what the config can switch on.

    python benchmarks/gpu.py

Needs neither Ray nor DeepSpeed. The model is a UNet of 140 M parameters on 64x64 images, AdamW, synthetic batches in
memory; ours is the trainer at stage 0 with EMA, gradient norms and metrics. In turn, medians over rounds. `--small`
is for a machine without a GPU, and says nothing about one.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmdist.diffusion.process import DiffusionConfig
from gmdist.families.ddpm import DDPM, DDPMConfig
from gmdist.families.family import Surroundings
from gmdist.nets.unet import UNetConfig
from gmdist.train.blocks import prepare
from gmdist.train.config import TrainConfig
from gmdist.train.engine import computing
from gmdist.train.optim import OptimConfig
from gmdist.train.state import RunIdentity
from gmdist.train.trainer import Trainer

WARM_UP, STEPS, ROUNDS = 10, 30, 3
# What is switched on in ours and, as far as torch has it, in the plain loop.
CASES: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "autocast"},
    {"precision": "bf16"},
    {"precision": "autocast", "channels_last": True},
    {"precision": "autocast", "compile": True},
    {"precision": "autocast", "compile": True, "channels_last": True},
    {"precision": "autocast", "activation_checkpointing": True},
]


@dataclasses.dataclass
class Part:
    """A part of a batch, as the trainer takes it."""

    batch: dict[str, Tensor]
    digest: int = 0
    quarantined: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        """The samples."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.batch.items()}


class Synthetic:
    """A data set of a few batches in memory, again and again."""

    num_samples = 1 << 30

    def __init__(self, batch_size: int, side: int) -> None:
        self.batch_size, self.side = batch_size, side
        self.parts = [self.first(batch_size) for _ in range(4)]

    def first(self, count: int) -> Part:
        """Some samples."""
        image = torch.rand(count, 3, self.side, self.side) * 2 - 1
        return Part({"image": image, "label": torch.arange(count) % 10, "key": torch.arange(count)})

    def batches(self, start: int) -> Iterator[Part]:
        """Batches without end."""
        return itertools.cycle(self.parts)

    def counters(self) -> dict[str, float]:
        """Nothing is read."""
        return {}

    def notes(self) -> list[str]:
        """Nothing is to be said."""
        return []


def model(small: bool, side: int) -> DDPM:
    """The same weights every time."""
    torch.manual_seed(0)
    unet = UNetConfig(channels=32 if small else 192, multipliers=(1, 2, 3), num_res_blocks=2, attention_levels=(2,))
    surroundings = Surroundings(side, 3, 10, 0, lambda _: None)
    return DDPM(DDPMConfig(unet=unet, diffusion=DiffusionConfig(schedule="cosine", prediction="v")), surroundings)


def ours(case: dict[str, Any], small: bool, batch_size: int, side: int, device: torch.device) -> dict[str, float]:
    """The last line of metrics of a run."""
    with tempfile.TemporaryDirectory(prefix="gmdist-gpu-") as run:
        config = TrainConfig(
            WARM_UP + STEPS, log_every=WARM_UP, checkpoint_every=10**6, sample_every=None, keep_checkpoints=1, **case
        )
        source = Synthetic(batch_size, side)
        optim = {"denoiser": OptimConfig()}
        identity = RunIdentity("ddpm", batch_size)
        trainer = Trainer(model(small, side), config, optim, identity, None, run, source, device=device)
        try:
            trainer.fit()
        finally:
            trainer.close()
        lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_s"] for line in lines[1:]]
    return lines[-1] | {"step_ms": 1e3 * batch_size / statistics.median(speeds)}


def plain(case: dict[str, Any], small: bool, batch_size: int, side: int, device: torch.device) -> float:
    """Milliseconds a step of a plain loop; in place of bf16 weights, which need fp32 ones behind them, autocast."""
    family = model(small, side).to(device)
    precision = "fp32" if case["precision"] == "fp32" else "autocast"
    prepare(family, ["denoiser"], TrainConfig(1, **(case | {"precision": precision})))
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-4, fused=True)
    batches = Synthetic(batch_size, side).batches(0)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            wait()
            start_s = time.perf_counter()
        with computing(precision, device):
            loss, _ = family.phases()[0].loss(next(batches).batch_on(device), step * batch_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return 1e3 * (time.perf_counter() - start_s) / STEPS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    small = options.small
    device = torch.device("cpu" if small else "cuda")
    batch_size, side = (4, 16) if small else (64, 64)
    print(f"torch {torch.__version__}, {'CPU' if small else torch.cuda.get_device_name()}, batch {batch_size}")
    print("| | plain | ours | ratio | images/s | TFLOP/s | MFU | GiB |\n|---|---|---|---|---|---|---|---|")
    for case in CASES[:2] if small else CASES:
        rounds = []
        for _ in range(ROUNDS):
            alone = plain(case, small, batch_size, side, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rounds.append((alone, ours(case, small, batch_size, side, device)))
        alone = statistics.median(peer for peer, _ in rounds)
        line = rounds[-1][1]
        ratio = statistics.median(found["step_ms"] / peer for peer, found in rounds)
        name = ", ".join(str(value) if key == "precision" else key for key, value in case.items())
        print(
            f"| {name} | {alone:.1f} ms | {line['step_ms']:.1f} ms | {ratio:.3f} | {line['images_per_s']:.0f} "
            f"| {line['tflops_worker']:.1f} | {line.get('mfu', float('nan')):.2f} | {line['memory_gib']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
