"""The moving average: its decay, its value against float64, and the swap."""

from pathlib import Path

import pytest
import torch

from gmdist.train.ema import decay
from tests.support import Linear, make_trainer


def test_decay() -> None:
    assert decay(1000, 10**9, 1.0, None) == pytest.approx(0.5)
    assert decay(500, 10**9, 1.0, 0.05) == pytest.approx(0.5**0.5)
    assert decay(100, 900, 500.0, 0.05) == pytest.approx(0.5 ** (100 / 50))  # the ramp: 5% of 1,000 images


def test_average_against_float64(tmp_path: Path) -> None:
    trainer = make_trainer(Linear(), tmp_path, num_steps=20, ema_halflife_kimg=0.05, ema_ramp=0.5)
    batches = trainer.data.batches(0)
    names = [fragment.name for fragment in trainer.ema.fragments]
    expected = {name: p.detach().double() for name, p in trainer.family.named_parameters()}
    for step in range(20):
        trainer.train_step(next(batches))
        halflife = min(50.0, 0.5 * (step + 1) * 8)
        beta = 0.5 ** (8 / halflife)
        for name, parameter in trainer.family.named_parameters():
            expected[name] = beta * expected[name] + (1 - beta) * parameter.detach().double()
    assert sorted(names) == sorted(expected)
    for name, average in zip(names, trainer.ema.averages, strict=True):
        torch.testing.assert_close(average.double(), expected[name].flatten(), rtol=1e-5, atol=1e-7)
    trainer.close()


def test_the_swap_is_undone_bit_by_bit(tmp_path: Path) -> None:
    trainer = make_trainer(Linear(), tmp_path)
    trainer.fit()
    before = {name: p.detach().clone() for name, p in trainer.family.named_parameters()}
    averages = [a.clone() for a in trainer.ema.averages]
    with trainer.ema.applied():
        inside = dict(trainer.family.named_parameters())["network.0.weight"].detach().clone()
    assert not torch.equal(inside, before["network.0.weight"])
    assert all(torch.equal(p, before[name]) for name, p in trainer.family.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(averages, trainer.ema.averages, strict=True))
    trainer.close()
