"""Sums of rows by place: right, and the same bits whatever threads there are."""

from collections.abc import Iterator

import pytest
import torch

from gmdist.families.warping import warped
from gmdist.nets.kmeans import kmeans
from gmdist.nets.sums import add_rows


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_rows_are_added_at_their_places() -> None:
    total, rows = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert add_rows(total, torch.tensor([2, 0, 2]), rows) is total
    assert total.tolist() == [[4.0, 5.0], [1.0, 1.0], [7.0, 9.0]]


def test_threads_do_not_change_a_sum(two_threads: None) -> None:
    torch.manual_seed(0)
    rows, places = torch.randn(8192, 40), torch.randint(50, (8192,))
    first = add_rows(torch.zeros(50, 40), places, rows)
    assert all(torch.equal(add_rows(torch.zeros(50, 40), places, rows), first) for _ in range(10))
    torch.set_num_threads(1)
    assert torch.equal(add_rows(torch.zeros(50, 40), places, rows), first)


def test_threads_change_neither_centres_nor_the_gradient_of_a_warp(two_threads: None) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4096, 16)

    def centres() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return kmeans(vectors, 32, 5, lambda _: torch.rand(4096, generator=generator), normalize=False)

    image, maps = torch.randn(5, 3, 64, 64), torch.tensor([[0.8, -0.6, 1.5], [0.6, 0.8, -2.5]]).double().expand(5, 2, 3)
    asked = torch.randn_like(image)

    def gradient() -> torch.Tensor:
        leaf = image.clone().requires_grad_()
        return torch.autograd.grad(warped(leaf, maps), leaf, asked)[0]

    for found in (centres, gradient):
        first = found()
        assert all(torch.equal(found(), first) for _ in range(10))
