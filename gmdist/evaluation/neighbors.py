"""Nearest neighbours in pixel space: does a model make new images, or copies of its training set?"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 1 << 22


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Root mean square pixel difference between each query and the reference nearest to it.

    Args:
        queries: uint8 [N, H, W, C].
        references: uint8 [M, H, W, C].

    Returns:
        float64 [N], in levels of 0 to 255.
    """
    flat, others = queries.flatten(1).double(), references.flatten(1).double()
    rows = max(1, _PAIRS_AT_ONCE // max(len(others), 1))
    # Exact differences: the expansion by inner products loses the small distances that matter here.
    nearest = [
        torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1) for part in flat.split(rows)
    ]
    return torch.cat(nearest) / flat.shape[1] ** 0.5


@dataclass(frozen=True)
class Novelty:
    """How far generated images are from the training set, beside how far held-out real ones are."""

    generated: float  # median distance to the nearest training image
    held_out: float  # the same for real images that were not trained on
    # Share of generated images that are a training image, or nearer than all but 1% of the held-out ones are; 0.01 by
    # chance.
    suspicious: float


def novelty(generated: Tensor, train: Tensor, held_out: Tensor) -> Novelty:
    """Compare generated images with held-out ones, all uint8 [N, H, W, C], by their distance to the training set."""
    from_generated, from_held_out = nearest_distances(generated, train), nearest_distances(held_out, train)
    threshold = torch.quantile(from_held_out, 0.01)
    return Novelty(
        float(from_generated.median()),
        float(from_held_out.median()),
        float(((from_generated < threshold) | (from_generated == 0.0)).double().mean()),
    )
