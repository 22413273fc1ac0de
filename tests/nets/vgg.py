"""The files of LPIPS with few channels and random weights, named as those who publish them name them."""

import torch
from torch import Tensor

WIDTHS = ((4, 4), (6, 6), (8, 8, 8), (10, 10, 10), (12, 12, 12))


def vgg_state(seed: int = 0) -> dict[str, Tensor]:
    """As torchvision saves VGG16: convolutions numbered among their activations and pools, then a classifier."""
    generator = torch.Generator().manual_seed(seed)
    state, number, width = {}, 0, 3
    for widths in WIDTHS:
        for out in widths:
            state[f"features.{number}.weight"] = 0.4 * torch.randn(out, width, 3, 3, generator=generator)
            state[f"features.{number}.bias"] = 0.1 * torch.randn(out, generator=generator)
            number, width = number + 2, out
        number += 1
    return state | {"classifier.0.weight": torch.randn(2, 3)}


def linear_state(prefix: str = "lin") -> dict[str, Tensor]:
    """As the lpips package saves its linear layers."""
    generator = torch.Generator().manual_seed(7)
    sizes = [widths[-1] for widths in WIDTHS]
    return {
        f"{prefix}{i}.model.1.weight": torch.rand(1, size, 1, 1, generator=generator) for i, size in enumerate(sizes)
    }
