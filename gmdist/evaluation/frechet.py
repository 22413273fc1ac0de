"""The Frechet distance of two sets of features (Heusel 2017), from moments that are streamed and merged."""

import torch
from torch import Tensor

from gmdist.workers import all_sum


class Moments:
    """Count, mean and scatter of vectors in float64.

    The scatter is the sum of (x - mean)(x - mean)^T: sums of squares would lose the covariance where means are large.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)  # [D]
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # [D, D]

    def add(self, features: Tensor) -> None:
        """Take in features [N, D], of any N."""
        if len(features) == 0:
            return
        rows = features.double()
        mean = rows.mean(dim=0)
        centered = rows - mean
        # Chan 1983: the scatter of two sets is the sum of theirs, and what their means lie apart.
        total = self.count + len(rows)
        shift = mean - self.mean
        self.scatter += centered.T @ centered + torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def merged(self) -> "Moments":
        """The moments of what all workers took in; every worker calls it, also with nothing taken in."""
        total = Moments(len(self.mean), self.mean.device)
        sums = all_sum(torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean]))
        total.count = int(sums[0].item())
        total.mean = sums[1:] / max(total.count, 1)
        shift = self.mean - total.mean
        total.scatter = all_sum(self.scatter + self.count * torch.outer(shift, shift))
        return total

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, float64 [D, D]; of at least two vectors."""
        assert self.count > 1, self.count
        return self.scatter / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of two Gaussians with these moments (Dowson 1982; Heusel 2017, Eq. 6).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)
    """
    first, second = one.covariance, other.covariance
    # With C1 = A A^T and C2 = B B^T, the trace of the root is the sum of the singular values of A^T B. The root of the
    # product itself may come out complex, and has errors of the root of the rounding.
    overlap = torch.linalg.svdvals(_root(first).T @ _root(second)).sum()
    distance = (one.mean - other.mean).square().sum() + first.trace() + second.trace() - 2.0 * overlap
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance, [D, R], without the directions that rounding alone gives a variance."""
    variances, directions = torch.linalg.eigh(covariance)
    smallest = variances[-1].clamp_min(0.0) * len(variances) * torch.finfo(torch.float64).eps
    there = variances > smallest
    return directions[:, there] * variances[there].sqrt()
