"""StyleGAN2's mapping network: from latents and classes to styles (Karras 2019, Sec. 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.equalized import EqualizedLinear, whole_precision

_LR_MULTIPLIER = 0.01  # Karras 2019, App. C


class MappingNetwork(nn.Module):
    """Layers of one width after latents and classes are brought to one length."""

    def __init__(self, latent_channels: int, num_classes: int, channels: int, num_layers: int) -> None:
        """Either of `latent_channels` and `num_classes` may be 0: there are none."""
        super().__init__()
        self.num_classes = num_classes
        self.embedding = EqualizedLinear(num_classes, channels) if num_classes else None
        width = latent_channels + (channels if num_classes else 0)
        self.layers = nn.ModuleList(
            EqualizedLinear(channels if i else width, channels, activated=True, lr_multiplier=_LR_MULTIPLIER)
            for i in range(num_layers)
        )

    def forward(self, latent: Tensor | None, label: Tensor | None = None) -> Tensor:
        """Latents [N, Z] and classes int64 [N] -> styles [N, W], fp32."""
        parts = [] if latent is None else [normalized(latent)]
        if self.embedding is not None:
            assert label is not None
            one_hot = F.one_hot(label, self.num_classes).to(self.embedding.weight.dtype)
            with whole_precision(one_hot, wanted=True):
                parts.append(normalized(self.embedding(one_hot)))
        x = torch.cat(parts, dim=1)
        with whole_precision(x, wanted=True):
            for layer in self.layers:
                x = layer(x)
        return x


def normalized(x: Tensor) -> Tensor:
    """[N, C] scaled to a mean square of 1 (Karras 2018, Sec. 4.2)."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
