"""What random numbers keyed by sample cost beside torch's own generator.

    python benchmarks/rng.py

Draws the noise of a batch of latents by `gmdist.rng.normal` and by `torch.randn` in turn, and prints the median time of
each and their ratio; then the noise's share of a training step, with the small UNet of the digits as the step.
"""

import statistics
import time
from collections.abc import Callable

import torch

from gmdist import rng
from gmdist.nets.unet import UNet, UNetConfig

SHAPES = [(64, 4, 8, 8), (64, 4, 32, 32), (16, 3, 256, 256)]


def seconds(*actions: Callable[[], object], repeats: int = 15) -> list[float]:
    """Median seconds of each action, run in turn after a warm-up."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 2):
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            if repeat >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'shape':>20s} {'keyed':>10s} {'torch':>10s} {'ratio':>7s}")
    for count, *shape in SHAPES:
        keys = torch.arange(count)
        keyed, own = seconds(
            lambda keys=keys, shape=tuple(shape): rng.normal(0, "noise", keys, shape),
            lambda count=count, shape=shape: torch.randn(count, *shape),
        )
        print(f"{(count, *shape)!s:>20s} {keyed * 1e3:8.2f}ms {own * 1e3:8.2f}ms {keyed / own:7.1f}")

    net = UNet(UNetConfig(64, (1, 2), 1, (0, 1), 4, 0.0), 4, 10)
    keys = torch.arange(64)
    x, label = torch.randn(64, 4, 8, 8), keys % 10

    def step() -> None:
        net(x, keys, label).square().mean().backward()

    noise, whole = seconds(lambda: rng.normal(0, "noise", keys, (4, 8, 8)), step)
    print(f"share of a training step (digits, batch 64): {100 * noise / (noise + whole):.2f}%")


if __name__ == "__main__":
    main()
