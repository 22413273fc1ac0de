"""Sums of rows by place, in the same order every time."""

from torch import Tensor


def add_rows(total: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Add each of the rows [N, D] to `total` [K, D], in place, at its place, int64 [N]; returns `total`.

    Several threads of a processor add by `index_put_` in the order in which they come to it, and those of a GPU by
    `index_add_`: the last bits would be others every time.
    """
    if total.is_cpu:
        return total.index_add_(0, places, rows)
    return total.index_put_((places,), rows, accumulate=True)
