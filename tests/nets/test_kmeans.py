"""The search for the nearest code against all distances at once, and k-means on clusters that are known."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmdist import rng
from gmdist.nets import kmeans as kmeans_module
from gmdist.nets.kmeans import _two_least, kmeans, nearest, sums_of


def dense(vectors: Tensor, codes: Tensor) -> Tensor:
    return (vectors[:, None].double() - codes[None].double()).square().sum(dim=2).argmin(dim=1)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "size", "width"), [(1, 1, 1), (7, 2, 3), (101, 37, 5), (333, 129, 32), (0, 4, 2)])
@pytest.mark.parametrize("chunk_elements", [1, 100, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_find_what_all_distances_at_once_find(count, size, width, chunk_elements, dtype) -> None:
    vectors, codes = numbers(count, width).to(dtype), numbers(size, width, seed=1).to(dtype)
    expected = dense(vectors, codes)
    assert torch.equal(nearest(vectors, codes, chunk_elements), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(vectors, codes, chunk_elements), expected)


def test_of_equal_codes_it_is_the_first() -> None:
    codes = numbers(64, 9).repeat(2, 1)
    vectors = torch.cat([codes, numbers(500, 9, seed=1)])
    for chunk_elements in (128, 1000, 1 << 20):
        found = nearest(vectors, codes, chunk_elements)
        assert torch.equal(found, dense(vectors, codes))
        assert found.max() < 64


def test_however_many_codes_are_equal_a_vector_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.cat([numbers(8, 9), torch.zeros(500, 9), numbers(8, 9)])
    vectors, pairs, exact = 0.1 * numbers(300, 9, seed=1), [], kmeans_module._exact
    monkeypatch.setattr(kmeans_module, "_exact", lambda *pair: pairs.append((found := exact(*pair)).numel()) or found)
    assert torch.equal(nearest(vectors, codes), dense(vectors, codes))
    assert sum(pairs) <= 4 * len(vectors)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 130, 192, 256, 1000, 8192, 20_000])
@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_the_two_least_of_a_row_are_the_first_in_order(size: int, levels: int) -> None:
    rows = torch.randint(0, levels, (50, size), generator=torch.Generator().manual_seed(0)).float()
    values, places = rows.sort(dim=1, stable=True)
    found, gap, lead = _two_least(rows.clone())
    assert torch.equal(found, places[:, :2].expand(-1, 2))
    assert torch.equal(gap, values[:, 1] - values[:, 0] if size > 1 else torch.full((50,), torch.inf))
    assert torch.equal(lead, values[:, 2] - values[:, 0] if size > 2 else torch.full((50,), torch.inf))


def test_wide_vectors_and_few_codes_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = numbers(4, 64).repeat(2, 1)  # each twice, so that all are compared exactly
    vectors, parts, exact = numbers(500, 64, seed=1), [], kmeans_module._exact
    monkeypatch.setattr(kmeans_module, "_exact", lambda *pair: parts.append(pair[1].numel()) or exact(*pair))
    assert torch.equal(nearest(vectors, codes, 1 << 14), dense(vectors, codes))
    assert len(parts) > 10
    assert max(parts) <= 1 << 14
    parts.clear()
    assert torch.equal(nearest(vectors, codes[:4]), dense(vectors, codes[:4]))
    assert sum(parts) == 0  # the product of matrices has said it


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_codes_that_differ_by_less_than_a_product_of_matrices_sees(offset: float) -> None:
    codes = numbers(50, 16) + offset
    codes = torch.cat([codes, codes * (1 + 2.0**-22)])
    vectors = (codes + 1e-3 * numbers(100, 16, seed=1)).repeat(5, 1)
    assert torch.equal(nearest(vectors, codes, 700), dense(vectors, codes))


@pytest.mark.parametrize("case", ["an outlier", "dead codes", "three of each", "all the same", "tiny", "huge"])
@pytest.mark.parametrize("chunk_elements", [1, 5000, 1 << 22])
def test_what_rounding_hides_is_sought_again(case: str, chunk_elements: int) -> None:
    vectors, codes = numbers(60, 16), numbers(384, 16, seed=1)
    if case == "an outlier":
        vectors, codes = 100 + 1e-4 * vectors, 100 + 1e-4 * codes
        codes[0] = -1e4
    elif case == "dead codes":
        vectors, codes = 5 + 0.01 * vectors, 5 + 0.01 * codes
        codes[::2] = 0.0
    elif case == "three of each":
        codes = codes[:128].repeat(3, 1)
    elif case == "all the same":
        codes = codes[:1].repeat(384, 1)
    else:
        scale = 1e-30 if case == "tiny" else 1e30
        vectors, codes = scale * vectors, scale * codes
    assert torch.equal(nearest(vectors, codes, chunk_elements), dense(vectors, codes))


def test_of_ordinary_vectors_hardly_any_is_sought_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[Tensor] = []
    monkeypatch.setattr(kmeans_module, "_nearest_of_all", lambda *args: again.append(args[0]) or args[2])
    for normalize in (False, True):
        vectors, codes = numbers(2000, 32), numbers(1024, 32, seed=1)
        nearest(*((F.normalize(x, dim=1) for x in (vectors, codes)) if normalize else (vectors, codes)))
    assert sum(map(len, again)) < 10


def test_vectors_that_are_not_finite_change_no_others() -> None:
    vectors, codes = numbers(40, 8), numbers(20, 8, seed=1)
    expected = dense(vectors, codes)
    vectors[3], vectors[5] = torch.nan, torch.inf
    rest = torch.arange(40)[(torch.arange(40) != 3) & (torch.arange(40) != 5)]
    assert torch.equal(nearest(vectors, codes)[rest], expected[rest])


def test_it_holds_no_more_distances_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: sizes.append(found := addmm(*args, **kwargs)) or found)
    nearest(numbers(1000, 4), numbers(30, 4, seed=1), 999)
    assert max(found.numel() for found in sizes) <= 999
    assert sum(len(found) for found in sizes) == 1000


def test_sums() -> None:
    vectors, tokens = numbers(100, 3), torch.arange(100) % 7
    found = sums_of(vectors, tokens, 9)
    for code in range(9):
        torch.testing.assert_close(found[code, :3], vectors[tokens == code].sum(0))
        assert found[code, 3] == (tokens == code).sum()


def draw(count: int, seed: int = 0):
    return lambda number: rng.uniform(seed, f"kmeans/{number}", torch.arange(count))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [3, 12, 40])
def test_kmeans_finds_separated_clusters(count: int, normalize: bool) -> None:
    centers = 10.0 * numbers(count, 16)
    centers = F.normalize(centers, dim=1) if normalize else centers
    tokens = torch.arange(60 * count) % count
    vectors = centers[tokens] + 0.001 * numbers(60 * count, 16, seed=1)
    vectors = F.normalize(vectors, dim=1) if normalize else vectors
    found = kmeans(vectors, count, 10, draw(len(vectors)), normalize=normalize)
    order = nearest(centers, found)
    assert order.unique().numel() == count
    for code in range(count):
        mean = vectors[tokens == code].mean(0)
        torch.testing.assert_close(found[order[code]], F.normalize(mean, dim=0) if normalize else mean)
    assert torch.equal(found, kmeans(vectors, count, 10, draw(len(vectors)), normalize=normalize))


def test_kmeans_of_as_many_vectors_as_centers_are_the_vectors() -> None:
    vectors = numbers(20, 4)
    found = kmeans(vectors, 20, 3, draw(20), normalize=False)
    torch.testing.assert_close(found[nearest(vectors, found)], vectors)
