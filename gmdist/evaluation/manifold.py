"""Precision and recall of a set of features by the neighbourhoods of another (Kynkaanniemi 2019)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gmdist.workers import all_sum, rank, world_size

_PAIRS_AT_ONCE = 1 << 22
_ROUNDING = 1e-12  # of squared distances, relative to the squared lengths they are made of


def precision_recall(
    generated: Tensor, real: Tensor, num_neighbors: int = 3, real_radii: Tensor | None = None
) -> tuple[float, float]:
    """Share of the generated that lie in the manifold of the real, and of the real in that of the generated.

    A set's manifold is the union of balls around its points, each as large as the distance to the point's k-th nearest
    neighbour (Eq. 1 and 2).

    Args:
        generated: features [N, D] with N > num_neighbors, the same on every worker; the workers share the pairs.
        real: [M, D].
        num_neighbors: k.
        real_radii: `radii_of` the real, where they are known.
    """
    if real_radii is None:
        real_radii = radii_of(real, num_neighbors)
    center = _center(real)
    generated, real = generated.double() - center, real.double() - center
    return (
        _share_inside(generated, real, real_radii),
        _share_inside(real, generated, _radii(generated, num_neighbors)),
    )


def radii_of(features: Tensor, num_neighbors: int) -> Tensor:
    """Squared distance of each row of features [N, D] to its k-th nearest neighbour, float64 [N]."""
    return _radii(features.double() - _center(features), num_neighbors)


def _center(features: Tensor) -> Tensor:
    """What is subtracted: distances do not change, and lose less to rounding."""
    return features.double().mean(dim=0)


def _radii(points: Tensor, num_neighbors: int) -> Tensor:
    assert len(points) > num_neighbors, (len(points), num_neighbors)
    radii = points.new_zeros(len(points))
    # The nearest is the point itself.
    nearest = [rows.kthvalue(num_neighbors + 1, dim=1).values for rows in _squared_distances(points, points)]
    if nearest:
        radii[rank() :: world_size()] = torch.cat(nearest)
    return all_sum(radii)


def _share_inside(points: Tensor, centers: Tensor, radii: Tensor) -> float:
    """Share of the points [N, D] that lie in a ball around any of the centers [M, D] with squared radii [M]."""
    count = points.new_zeros(())
    for rows in _squared_distances(points, centers):
        count += (rows <= radii).any(dim=1).sum()
    return float(all_sum(count)) / len(points)


def _squared_distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Squared distances of this worker's points to all others, some rows [R, M] at a time."""
    lengths = others.square().sum(dim=1)
    for rows in points[rank() :: world_size()].split(max(1, _PAIRS_AT_ONCE // len(others))):
        sums = rows.square().sum(dim=1, keepdim=True) + lengths
        squared = torch.addmm(sums, rows, others.T, alpha=-2.0)
        yield torch.where(squared > _ROUNDING * sums, squared, 0.0)
