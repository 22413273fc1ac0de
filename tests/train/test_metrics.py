"""Averages: means over observations and workers, of scalars and of more."""

import math

import torch

from gmdist.train.metrics import Averages
from tests.support import run_workers

CPU = torch.device("cpu")


def test_means_are_weighted_and_leave_out_what_is_not_finite() -> None:
    averages = Averages(CPU)
    averages.add({"a": torch.tensor(1.0), "v": torch.tensor([1.0, math.nan, math.inf])}, weight=3.0)
    averages.add({"a": torch.tensor(5.0), "v": torch.tensor([5.0, 7.0, math.nan])}, weight=1.0)
    means = averages.means()
    assert means["a"] == 2.0
    assert means["v"][:2].tolist() == [2.0, 7.0]
    assert means["v"][2].isnan()
    assert averages.means() == {}


def _each_adds(rank: int, world_size: int) -> None:
    averages = Averages(CPU)
    averages.add({"both": torch.full((2, 3), float(rank))}, weight=1.0 + rank)
    if rank == 1:
        averages.add({"alone": torch.tensor([4.0, 5.0])})
    restored = Averages(CPU)
    restored.restore(averages.gather())
    for kept in (averages, restored):
        means = kept.means()
        assert list(means) == ["alone", "both"]
        assert means["alone"].tolist() == [4.0, 5.0]
        torch.testing.assert_close(means["both"], torch.full((2, 3), 2.0 / 3.0, dtype=torch.float64))


def test_means_over_workers_that_do_not_have_the_same() -> None:
    run_workers(_each_adds, 2)
