"""One GPU: the trainer's step beside a plain torch loop's, then networks of the field, from denoisers to StyleGAN2.

    python benchmarks/gpu.py

Needs neither Ray nor DeepSpeed. The first table's model is a UNet of 140 M parameters on 64x64 images, AdamW, synthetic
batches in memory, in every precision, with what the config can switch on; ours is the trainer at stage 0 with EMA,
gradient norms and metrics. In turn, medians over rounds. The second table (`gpu_latents.py`) is the trainer's with
Stable Diffusion 1's UNet and DiT-XL/2, the third (`gpu_tokenizers.py`) with ViT VQ-VAEs and transformer priors, the
fourth (`gpu_gans.py`) with StyleGAN2. What does not run is said in its line. `--small` is for a machine without a GPU,
and says nothing about one.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import gpu_gans
import gpu_latents
import gpu_tokenizers
import torch
from gpu_table import print_table
from in_memory import Synthetic, free_memory, one_line, train
from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig
from gmdist.errors import MemoryExceededError
from gmdist.families.ddpm import DDPM, DDPMConfig
from gmdist.families.family import Surroundings
from gmdist.nets.unet import UNetConfig
from gmdist.train.blocks import prepare
from gmdist.train.config import TrainConfig
from gmdist.train.engine import computing
from gmdist.train.optim import OptimConfig

TABLES = ["loop", "latents", "tokenizers", "gans"]
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


def images(side: int, count: int) -> dict[str, Tensor]:
    """Some samples."""
    return {"image": torch.rand(count, 3, side, side) * 2 - 1, "label": torch.arange(count) % 10}


def model(small: bool, side: int) -> DDPM:
    """The same weights every time."""
    torch.manual_seed(0)
    unet = UNetConfig(channels=32 if small else 192, multipliers=(1, 2, 3), num_res_blocks=2, attention_levels=(2,))
    surroundings = Surroundings(side, 3, 10, 0, lambda _: None)
    return DDPM(DDPMConfig(unet=unet, diffusion=DiffusionConfig(schedule="cosine", prediction="v")), surroundings)


def ours(case: dict[str, Any], small: bool, batch_size: int, side: int, device: torch.device) -> dict[str, float]:
    """The last line of metrics of a run."""
    config = TrainConfig(
        WARM_UP + STEPS, log_every=WARM_UP, checkpoint_every=10**6, sample_every=None, keep_checkpoints=1, **case
    )
    source = Synthetic(batch_size, functools.partial(images, side))
    lines = train(model(small, side), config, source, device, {"denoiser": OptimConfig()})
    speeds = [line["images_per_s"] for line in lines[1:]]
    return lines[-1] | {"step_ms": 1e3 * batch_size / statistics.median(speeds)}


def plain(case: dict[str, Any], small: bool, batch_size: int, side: int, device: torch.device) -> float:
    """Milliseconds a step of a plain loop; in place of bf16 weights, which need fp32 ones behind them, autocast."""
    family = model(small, side).to(device)
    precision = "fp32" if case["precision"] == "fp32" else "autocast"
    prepare(family, ["denoiser"], TrainConfig(1, **(case | {"precision": precision})))
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-4, fused=True)
    batches = Synthetic(batch_size, functools.partial(images, side)).batches(0)

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


def compared(case: dict[str, Any], small: bool, batch_size: int, side: int, device: torch.device) -> str:
    """The columns of a case."""
    rounds = []
    for _ in range(ROUNDS):
        alone = plain(case, small, batch_size, side, device)
        rounds.append((alone, ours(case, small, batch_size, side, device)))
    alone = statistics.median(peer for peer, _ in rounds)
    line = rounds[-1][1]
    ratio = statistics.median(found["step_ms"] / peer for peer, found in rounds)
    return (
        f"{alone:.1f} ms | {line['step_ms']:.1f} ms | {ratio:.3f} | {line['images_per_s']:.0f} "
        f"| {line['tflops_worker']:.1f} | {line.get('mfu', float('nan')):.2f} | {line['memory_gib']:.1f}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    options = parser.parse_args()
    small = options.small
    if not small and not torch.cuda.is_available():
        print("no GPU here, so that nothing is measured; --small runs the same with tiny networks on the CPU")
        return
    device = torch.device("cpu" if small else "cuda")
    batch_size, side = (4, 16) if small else (64, 64)
    print(f"torch {torch.__version__}, {'CPU' if small else torch.cuda.get_device_name()}")
    if "loop" in options.tables:
        print(f"\n| batch {batch_size} | plain | ours | ratio | images/s | TFLOP/s | MFU | GiB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for case in CASES[:2] if small else CASES:
            name = ", ".join(str(value) if key == "precision" else key for key, value in case.items())
            try:
                columns = compared(case, small, batch_size, side, device)
            except (MemoryExceededError, torch.OutOfMemoryError):
                columns = "out of memory | | | | | |"
            except Exception as error:  # noqa: BLE001 - a compiler that does not run here
                columns = f"{one_line(error)} | | | | | |"
            free_memory()
            print(f"| {name} | {columns} |", flush=True)
    if "latents" in options.tables:
        print_table(gpu_latents.SMALL_CASES if small else gpu_latents.CASES, small, device)
    if "tokenizers" in options.tables:
        print_table(gpu_tokenizers.SMALL_CASES if small else gpu_tokenizers.CASES, small, device)
    if "gans" in options.tables:
        gpu_gans.print_table(gpu_gans.SMALL_CASES if small else gpu_gans.CASES, small, device)


if __name__ == "__main__":
    main()
