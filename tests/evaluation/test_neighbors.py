"""Nearest neighbours: the distances are the true ones, and a model that copies is caught."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gmdist.evaluation import neighbors
from gmdist.evaluation.neighbors import nearest_distances, novelty


def noise(count: int, seed: int, size: int = 6, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("pairs_at_once", [1 << 22, 50, 1])
@pytest.mark.parametrize(("queries", "references"), [(7, 20), (1, 1), (20, 3)])
def test_distances_are_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, pairs_at_once: int, queries: int, references: int
) -> None:
    monkeypatch.setattr(neighbors, "_PAIRS_AT_ONCE", pairs_at_once)
    a, b = noise(queries, 1), noise(references, 2)
    difference = a.numpy().astype(np.float64)[:, None] - b.numpy().astype(np.float64)[None]
    expected = np.sqrt((difference**2).mean(axis=(2, 3, 4))).min(axis=1)
    found = nearest_distances(a, b)
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected).max() < 1e-9


def test_the_smallest_differences_count() -> None:
    references = noise(30, 3, size=16)
    assert nearest_distances(references[:5], references).tolist() == [0.0] * 5
    almost = references[:1].clone()
    almost[0, 0, 0, 0] ^= 1
    assert nearest_distances(almost, references).item() == pytest.approx((1 / almost.numel()) ** 0.5, rel=1e-12)


def test_the_scale_is_levels() -> None:
    black, white = torch.zeros(1, 4, 4, 1, dtype=torch.uint8), torch.full((1, 4, 4, 1), 255, dtype=torch.uint8)
    assert nearest_distances(black, white).item() == 255.0


def test_copies_are_caught() -> None:
    train, held_out = noise(200, 4), noise(100, 5)
    copied = novelty(train[:50], train, held_out)
    assert copied.generated == 0.0
    assert copied.suspicious == 1.0
    touched = train[:50].clone()
    touched[:, 0, 0] ^= 3
    assert novelty(touched, train, held_out).suspicious == 1.0
    half = novelty(torch.cat([train[:50], noise(50, 6)]), train, held_out)
    assert 0.5 <= half.suspicious < 0.6


def test_copies_are_caught_where_held_out_images_are_copies_too() -> None:
    train = noise(200, 4)
    assert novelty(train[:50], train, torch.cat([train[:5], noise(95, 5)])).suspicious == 1.0


def test_new_images_are_not() -> None:
    result = novelty(noise(300, 7), noise(200, 8), noise(300, 9))
    assert result.suspicious < 0.05
    assert result.generated == pytest.approx(result.held_out, rel=0.02)
