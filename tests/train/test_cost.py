"""What a step costs: FLOPs of losses that change, peaks of devices, and the clock."""

import time

import pytest
import torch

from gmdist.families.family import Phase
from gmdist.train import cost
from gmdist.train.control import Clock
from gmdist.train.cost import FlopCount, peak_flops


def product(size: int) -> None:
    torch.zeros(size, size) @ torch.zeros(size, size)


def test_a_loss_that_changes_is_counted_again_once() -> None:
    phase = Phase("net", "net", lambda batch, seen: (torch.zeros(()), {}), changes_at=100)
    flops = FlopCount()
    for seen, size, known in ((0, 4, 64.0), (50, 8, 64.0), (100, 16, 4096.0), (150, 32, 4096.0)):
        resumed = FlopCount()  # and a run that goes on counts what it would have
        resumed.load(flops.state())
        for each in (flops, resumed):
            with each.counting(phase, 2, seen):
                product(size)
            assert each.a_sample() == known


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),  # none rather than another's
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_those_of_the_device(name: str, bf16: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == bf16


def test_steps_that_are_made_again_have_taken_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second a step; nothing else takes time."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(0)
    now = 100.0
    assert clock.lap(100) == (100, 100.0)
    now = 130.0
    clock.rewind(10)  # to step 120
    now = 150.0
    assert clock.seconds_a_step(140) == 1.0
    assert clock.lap(140) == (50, 50.0)
