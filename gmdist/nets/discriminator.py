"""The discriminator of patches that judges reconstructions (Isola 2017, Sec. 3.2.2)."""

from torch import Tensor, nn

from gmdist.checks import between
from gmdist.nets.blocks import group_norm
from gmdist.nets.products import Conv2d

_MAX_CHANNELS = 1 << 12
_MAX_MULTIPLIER = 8


class PatchDiscriminator(nn.Module):
    """Image to a map of logits, each of which judges one patch; 70 pixels a side at three strided layers.

    The published network has batch norm: there a sample's loss depends on the samples that its worker happens to hold
    beside it, and running statistics do not go with bf16. Here the norms are GroupNorm, of one sample each. The number
    of parameters is the same (2,765,633 for RGB at the defaults).
    """

    def __init__(self, image_channels: int, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, num_layers + 1):
            out = channels * min(2**level, _MAX_MULTIPLIER)
            stride = 2 if level < num_layers else 1
            layers.append(Conv2d(width, out, 4, stride=stride, padding=1, bias=False))  # the norm has a bias
            layers += [group_norm(out), nn.LeakyReLU(0.2)]
            width = out
        layers.append(Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)  # Radford 2016, Sec. 3
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Image [N, C, H, W] in [-1, 1] -> logits [N, 1, h, w], above zero for "real"."""
        return self.layers(image)


def sizes_problem(channels: int, num_layers: int, image_size: int, layers: str = "num_layers") -> str | None:
    """Why a network of these sizes cannot judge such images, as "key: value; what is valid"; None if it can.

    `layers` is the key that names `num_layers`.
    """
    if problem := between(1, _MAX_CHANNELS, channels=channels):
        return problem
    if not 1 <= num_layers <= 16 or image_size < smallest_side(num_layers):
        return (
            f"{layers}: {num_layers}; must be at least 1, and image sides at least 3 * 2^{layers} pixels: "
            f"data.image_size is {image_size}"
        )
    return None


def smallest_side(num_layers: int) -> int:
    """The pixels a side that an image must have for one logit: the strides halve, then two layers take one each."""
    return 3 * 2**num_layers
