"""The kernel distance of two sets of features: KID (Binkowski 2018)."""

from torch import Tensor

from gmdist.workers import all_sum, rank, world_size

_PAIRS_AT_ONCE = 1 << 22


def kernel_distance(one: Tensor, other: Tensor, within_other: Tensor | None = None) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton 2012, Eq. 3), over all pairs.

    The kernel is (x y / D + 1)^3. Averages over subsets, as some implementations take, estimate the same with more
    noise. Near 0, and at times below, for sets of one distribution.

    Args:
        one: features [N, D], the same on every worker; the workers share the pairs.
        other: [M, D].
        within_other: `mean_within` of the other set, where it is known.
    """
    if within_other is None:
        within_other = mean_within(other)
    between = _kernel_sum(one.double(), other.double()) / (len(one) * len(other))
    return float(mean_within(one) + within_other - 2.0 * between)


def mean_within(features: Tensor) -> Tensor:
    """The mean of the kernel over all pairs of two different rows of features [N, D], float64 []."""
    rows = features.double()
    diagonal = _kernel(rows.square().sum(dim=1), rows.shape[1]).sum()
    return (_kernel_sum(rows, rows) - diagonal) / (len(rows) * (len(rows) - 1))


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1.0) ** 3


def _kernel_sum(one: Tensor, other: Tensor) -> Tensor:
    """The kernel summed over all pairs, float64 []."""
    total = one.new_zeros(())
    for rows in one[rank() :: world_size()].split(max(1, _PAIRS_AT_ONCE // len(other))):
        total += _kernel(rows @ other.T, one.shape[1]).sum()
    return all_sum(total)
