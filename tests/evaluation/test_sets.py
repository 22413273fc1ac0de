"""Kernel distance, precision and recall against what they are by definition, on one worker and on several."""

import itertools

import pytest
import torch

from gmdist.evaluation import kernel, manifold
from gmdist.evaluation.gather import gathered
from gmdist.evaluation.kernel import kernel_distance
from gmdist.evaluation.manifold import precision_recall
from tests.support import run_workers


def points(count: int, seed: int, shift: float = 0.0, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def by_definition(one: torch.Tensor, other: torch.Tensor) -> float:
    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x.double() @ y.double()) / len(x) + 1.0) ** 3

    within = [
        sum(k(x, y) for x, y in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1))
        for rows in (one, other)
    ]
    return within[0] + within[1] - 2.0 * sum(k(x, y) for x in one for y in other) / (len(one) * len(other))


def test_kernel_distance_is_its_definition() -> None:
    one, other = points(9, 0), points(13, 1, shift=0.5)
    assert kernel_distance(one, other) == pytest.approx(by_definition(one, other), rel=1e-12)


def test_kernel_distance_has_no_bias() -> None:
    # The biased estimate is above 0 always; this one is as often below, for sets of one distribution.
    found = [kernel_distance(points(20, 2 * i), points(20, 2 * i + 1)) for i in range(200)]
    assert abs(sum(found) / 200) < 0.05 * max(map(abs, found))
    assert min(found) < 0.0


def test_the_same_sets_cover_each_other_and_distant_ones_do_not() -> None:
    rows = points(50, 0)
    assert precision_recall(rows, rows.flip(0)) == (1.0, 1.0)
    assert precision_recall(rows, points(40, 1, shift=100.0)) == (0.0, 0.0)
    copies = rows[:1].repeat(20, 1) + 1000.0  # all neighbours at distance 0, and far from the origin
    assert precision_recall(copies, copies) == (1.0, 1.0)


def test_precision_and_recall_tell_quality_from_diversity() -> None:
    real = torch.cat([points(100, 0), points(100, 1, shift=50.0)])
    one_mode = points(100, 2)
    precision, recall = precision_recall(one_mode, real)
    assert precision > 0.8  # what is made is real
    assert recall < 0.52  # the other half is missing
    assert precision_recall(real, one_mode) == (recall, precision)


def test_the_neighbourhoods_are_those_of_the_paper() -> None:
    generated, real = points(30, 3, shift=0.4), points(25, 4)

    def share(inner: torch.Tensor, outer: torch.Tensor) -> float:
        radii = torch.cdist(outer, outer).sort(dim=1).values[:, 3]
        return float((torch.cdist(inner, outer) <= radii).any(dim=1).double().mean())

    found = precision_recall(generated, real, 3)
    assert found == (share(generated, real), share(real, generated))
    assert 0.0 < found[0] < 1.0


@pytest.mark.parametrize("pairs", [1, 100])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    one, other = points(30, 5), points(20, 6, shift=0.3)
    whole = kernel_distance(one, other), precision_recall(one, other)
    monkeypatch.setattr(kernel, "_PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(manifold, "_PAIRS_AT_ONCE", pairs)
    assert kernel_distance(one, other) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(one, other) == whole[1]


def share_pairs(rank: int, world_size: int, expected: tuple[float, tuple[float, float]]) -> None:
    keys = torch.arange(30).split([17, 13, 0])[rank].flip(0)
    one, other = gathered(keys, points(30, 7)[keys]), points(20, 8, shift=0.3)
    assert torch.equal(one, points(30, 7))
    assert kernel_distance(one, other) == pytest.approx(expected[0], rel=1e-12)
    assert precision_recall(one, other) == expected[1]


def test_workers_share_the_pairs() -> None:
    one, other = points(30, 7), points(20, 8, shift=0.3)
    run_workers(share_pairs, 3, (kernel_distance(one, other), precision_recall(one, other)))
