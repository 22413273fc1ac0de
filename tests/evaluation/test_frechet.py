"""The Frechet distance: closed forms, scipy, singular covariances; moments streamed and merged over workers."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.evaluation.frechet import Moments, frechet_distance
from tests.support import run_workers


def features(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator) @ mixing * scale + shift


def moments(rows: torch.Tensor, batch_size: int | None = None) -> Moments:
    found = Moments(rows.shape[1])
    for part in rows.split(batch_size or len(rows)):
        found.add(part)
    return found


def with_covariance(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    found = Moments(len(mean))
    found.count, found.mean, found.scatter = 11, mean, 10 * covariance
    return found


def test_streamed_moments_are_those_of_the_whole() -> None:
    rows = features(101, 7, seed=0, shift=1e4)  # a mean that drowns the variance in a sum of squares
    for batch_size in (1, 10, 101):
        found = moments(rows, batch_size)
        exact = rows.double().numpy()
        assert found.count == 101
        np.testing.assert_allclose(found.mean.numpy(), exact.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance.numpy(), np.cov(exact, rowvar=False), atol=1e-10, rtol=1e-10)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    deviations = torch.rand(2, 20, generator=generator, dtype=torch.float64) + 0.1
    one, other = (with_covariance(means[i], deviations[i].square().diag()) for i in (0, 1))
    exact = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("counts", [(200, 300), (10, 300), (10, 12)])
def test_agrees_with_the_root_of_the_product(counts: tuple[int, int]) -> None:
    # With fewer vectors than dimensions covariances are singular: scipy's root comes out complex, with errors of 1e-5.
    one, other = features(counts[0], 24, seed=2), features(counts[1], 24, seed=3, scale=1.3, shift=0.2)
    first, second = (np.cov(rows.double().numpy(), rowvar=False) for rows in (one, other))
    root = scipy.linalg.sqrtm(first @ second).real
    shift = (one.double().mean(dim=0) - other.double().mean(dim=0)).square().sum()
    expected = float(shift) + np.trace(first + second - 2 * root)
    tolerance = 1e-9 if min(counts) > 24 else 1e-4
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(expected, abs=tolerance)


def test_is_nothing_between_equals_and_symmetric() -> None:
    for count in (8, 200):
        one, other = moments(features(count, 16, seed=4)), moments(features(count, 16, seed=5))
        assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-10)
        assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-10)
        assert frechet_distance(one, other) > 0.1


def test_collapsed_images_have_a_distance_too() -> None:
    spread, collapsed = moments(features(50, 6, seed=8)), moments(torch.ones(20, 6))
    exact = (spread.mean - 1.0).square().sum() + spread.covariance.trace()
    assert frechet_distance(collapsed, spread) == pytest.approx(float(exact), rel=1e-12)
    assert frechet_distance(collapsed, collapsed) == 0.0


def test_halves_of_the_digits_are_near_each_other(digits: Path) -> None:
    config = DataConfig(64, 32, f"{digits}/train", channels=1)
    sweep = Loader(config, f"{digits}/train").sweep(64)
    rows = torch.cat([torch.nn.functional.avg_pool2d(loaded.batch["image"], 4).flatten(1) for loaded in sweep])
    halves = moments(rows[::2]), moments(rows[1::2])
    mirrored = moments(rows[1::2].view(-1, 8, 8).flip(2).flatten(1))
    assert frechet_distance(*halves) < 0.05 * frechet_distance(halves[0], mirrored)


def merge(rank: int, world_size: int) -> None:
    rows = features(90, 12, seed=6, shift=100.0)
    # One worker has nothing.
    own = [rows[:50], rows[50:], rows[:0]][rank]
    merged, whole = moments(own).merged() if len(own) else Moments(12).merged(), moments(rows)
    assert merged.count == 90
    torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=0, atol=1e-10)
    other = moments(features(70, 12, seed=7, shift=100.0))
    assert abs(frechet_distance(merged, other) - frechet_distance(whole, other)) < 1e-10


def test_workers_merge_their_moments() -> None:
    run_workers(merge, 3)
