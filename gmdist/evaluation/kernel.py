"""The kernel distance of two sets of features: KID (Binkowski 2018)."""

from torch import Tensor

from gmdist.workers import all_sum, rank, world_size

_PAIRS_AT_ONCE = 1 << 22


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton 2012, Eq. 3), over all pairs.

    The kernel is (x y / D + 1)^3. Averages over subsets, as some implementations take, estimate the same with more
    noise. Near 0, and at times below, for sets of one distribution.

    Args:
        one: features [N, D], the same on every worker; the workers share the pairs.
        other: [M, D].
    """
    one, other = one.double(), other.double()
    within = [
        (_kernel_sum(rows, rows) - _kernel(rows.square().sum(dim=1), rows.shape[1]).sum())
        / (len(rows) * (len(rows) - 1))
        for rows in (one, other)
    ]
    between = _kernel_sum(one, other) / (len(one) * len(other))
    return float(within[0] + within[1] - 2.0 * between)


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1.0) ** 3


def _kernel_sum(one: Tensor, other: Tensor) -> Tensor:
    """The kernel summed over all pairs, float64 []."""
    total = one.new_zeros(())
    for rows in one[rank() :: world_size()].split(max(1, _PAIRS_AT_ONCE // len(other))):
        total += _kernel(rows @ other.T, one.shape[1]).sum()
    return all_sum(total)
