"""StyleGAN2 by the book, in float64, on tensors as its authors name them (stylegan2-ada-pytorch, training/networks.py).

A kernel for each sample, zeros between pixels, convolutions as sums of products: slow, and nothing of gmdist.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What the authors' constructors are told."""

    architecture: str
    side: int = 16
    channels: int = 3
    classes: int = 0
    latent: int = 7
    style: int = 6
    layers: int = 2
    base: int = 128
    widest: int = 12
    compares: bool = True  # the discriminator has a feature of its batch

    @property
    def sides(self) -> list[int]:
        return [4 << i for i in range(int(math.log2(self.side)) - 1)]

    def width(self, side: int) -> int:
        return min(self.base // side, self.widest)


def generator_shapes(sizes: Sizes) -> Shapes:
    style = sizes.style
    shapes = _mapping_shapes(sizes.latent, sizes.classes, style, sizes.layers) | {"mapping.w_avg": (style,)}
    below = 0
    for side in sizes.sides:
        block, width = f"synthesis.b{side}", sizes.width(side)
        shapes[f"{block}.resample_filter"] = (4, 4)
        if not below:
            shapes[f"{block}.const"] = (width, side, side)
        for layer, taken_in in (("conv0", below), ("conv1", width)):
            if taken_in:
                name = f"{block}.{layer}"
                shapes |= {f"{name}.affine.weight": (taken_in, style), f"{name}.affine.bias": (taken_in,)}
                shapes |= {f"{name}.weight": (width, taken_in, 3, 3), f"{name}.bias": (width,)}
                shapes |= {f"{name}.noise_const": (side, side), f"{name}.noise_strength": ()}
                shapes[f"{name}.resample_filter"] = (4, 4)
        if side == sizes.side or sizes.architecture == "skip":
            name = f"{block}.torgb"
            shapes |= {f"{name}.affine.weight": (width, style), f"{name}.affine.bias": (width,)}
            shapes |= {f"{name}.weight": (sizes.channels, width, 1, 1), f"{name}.bias": (sizes.channels,)}
        if below and sizes.architecture == "resnet":
            shapes |= {f"{block}.skip.weight": (width, below, 1, 1), f"{block}.skip.resample_filter": (4, 4)}
        below = width
    return shapes


def discriminator_shapes(sizes: Sizes) -> Shapes:
    last = sizes.width(4)
    shapes = _mapping_shapes(0, sizes.classes, last, sizes.layers) if sizes.classes else {}
    for side in sizes.sides[:0:-1]:
        width, above = sizes.width(side), sizes.width(side // 2)
        shapes[f"b{side}.resample_filter"] = (4, 4)
        layers = {"conv0": (width, width, 3, 3), "conv1": (above, width, 3, 3)}
        if side == sizes.side or sizes.architecture == "skip":
            layers["fromrgb"] = (width, sizes.channels, 1, 1)
        if sizes.architecture == "resnet":
            layers["skip"] = (above, width, 1, 1)
        for layer, shape in layers.items():
            shapes |= {f"b{side}.{layer}.weight": shape, f"b{side}.{layer}.resample_filter": (4, 4)}
            if layer != "skip":
                shapes[f"b{side}.{layer}.bias"] = shape[:1]
    layers = {"conv": (last, last + sizes.compares, 3, 3)}
    if sizes.architecture == "skip":
        layers["fromrgb"] = (last, sizes.channels, 1, 1)
    for layer, shape in layers.items():
        shapes |= {f"b4.{layer}.weight": shape, f"b4.{layer}.bias": shape[:1], f"b4.{layer}.resample_filter": (4, 4)}
    out = last if sizes.classes else 1
    shapes |= {"b4.fc.weight": (last, last * 16), "b4.fc.bias": (last,)}
    return shapes | {"b4.out.weight": (out, last), "b4.out.bias": (out,)}


def _mapping_shapes(latent: int, classes: int, width: int, layers: int) -> Shapes:
    shapes: Shapes = {}
    if classes:
        shapes |= {"mapping.embed.weight": (width, classes), "mapping.embed.bias": (width,)}
    taken_in = latent + (width if classes else 0)
    for i in range(layers):
        shapes |= {f"mapping.fc{i}.weight": (width, width if i else taken_in), f"mapping.fc{i}.bias": (width,)}
    return shapes


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Weights fp32 such as trained ones might be: no part of the network counts for nothing."""
    random = torch.Generator().manual_seed(seed)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        if name.endswith("resample_filter"):
            value = torch.outer(taps, taps) / 64
        elif ".fc" in name and name.startswith("mapping"):
            value *= 100.0 if name.endswith("weight") else 30.0  # their learning rate is 0.01
        elif name.endswith("affine.bias"):
            value = 1.0 + 0.3 * value
        elif name.endswith(("bias", "noise_strength", "w_avg")):
            value *= 0.5
        state[name] = value
    return state


def styles_of(state: State, latent: Tensor, label: Tensor | None, psi: float = 1.0) -> Tensor:
    """Latents [N, Z] and int64 [N] to styles [N, W], moved to w_avg but for a share psi."""
    style = _mapped(_double(state), latent.double(), label)
    mean = state["mapping.w_avg"].double()
    return mean + psi * (style - mean)


def images_of(state: State, style: Tensor) -> Tensor:
    """Images [N, C, H, W] of one style [N, W] for all layers, with the noise that comes with the network."""
    s, style = _double(state), style.double()
    x = s["synthesis.b4.const"].expand(len(style), -1, -1, -1)
    image, side = None, 4
    while (block := f"synthesis.b{side}") + ".conv1.weight" in s:
        below = x
        if side > 4:
            x = _styled(s, f"{block}.conv0", x, style, up=True)
        x = _styled(s, f"{block}.conv1", x, style)
        if f"{block}.skip.weight" in s:
            shortcut = _scaled(s, f"{block}.skip", _doubled(below, s[f"{block}.skip.resample_filter"]))
            x = math.sqrt(0.5) * (shortcut + x)
        image = None if image is None else _doubled(image, s[f"{block}.resample_filter"])
        if f"{block}.torgb.weight" in s:
            weight = s[f"{block}.torgb.weight"]
            scale = _dense(s, f"{block}.torgb.affine", style) / math.sqrt(weight.shape[1])
            shown = _correlated(x, weight[None] * scale[:, None, :, None, None])
            shown = shown + s[f"{block}.torgb.bias"][:, None, None]
            image = shown if image is None else image + shown
        side *= 2
    assert image is not None
    return image


def logits_of(state: State, image: Tensor, label: Tensor | None, group: int = 4) -> Tensor:
    """[N, C, H, W] and int64 [N] to [N, 1]; the group divides N."""
    s, image = _double(state), image.double()
    x: Tensor | None = None
    side = image.shape[-1]
    while side > 4:
        block = f"b{side}"
        if f"{block}.fromrgb.weight" in s:
            x = _activated(_scaled(s, f"{block}.fromrgb", image)) + (0.0 if x is None else x)
            image = _halved(image, s[f"{block}.resample_filter"])
        assert x is not None
        y = _activated(_scaled(s, f"{block}.conv0", F.pad(x, (1, 1, 1, 1))))
        y = _filtered(y, s[f"{block}.conv1.resample_filter"], 2, 2)
        y = _activated(_scaled(s, f"{block}.conv1", y)[:, :, ::2, ::2])
        if f"{block}.skip.weight" in s:
            shortcut = _scaled(s, f"{block}.skip", _halved(x, s[f"{block}.skip.resample_filter"]))
            y = math.sqrt(0.5) * (shortcut + y)
        x, side = y, side // 2
    assert x is not None
    if "b4.fromrgb.weight" in s:
        x = x + _activated(_scaled(s, "b4.fromrgb", image))
    if s["b4.conv.weight"].shape[1] > x.shape[1]:
        size = len(x) // group
        features = torch.empty_like(x[:, :1])
        for i in range(size):  # every size-th sample is of one group
            spread = (x[i::size].var(dim=0, unbiased=False) + 1e-8).sqrt()
            features[i::size] = spread.mean()
        x = torch.cat([x, features], dim=1)
    x = _activated(_scaled(s, "b4.conv", F.pad(x, (1, 1, 1, 1)))).flatten(1)
    x = _dense(s, "b4.out", _activated(_dense(s, "b4.fc", x)))
    if label is None:
        return x
    return (x * _mapped(s, None, label)).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])


def _double(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def _mapped(s: State, latent: Tensor | None, label: Tensor | None) -> Tensor:
    parts = [] if latent is None else [latent]
    if label is not None:
        one_hot = torch.eye(s["mapping.embed.weight"].shape[1], dtype=torch.float64)[label]
        parts.append(_dense(s, "mapping.embed", one_hot))
    x = torch.cat([part / (part.square().mean(dim=1, keepdim=True) + 1e-8).sqrt() for part in parts], dim=1)
    i = 0
    while f"mapping.fc{i}.weight" in s:
        x, i = _activated(_dense(s, f"mapping.fc{i}", x, 0.01)), i + 1
    return x


def _styled(s: State, name: str, x: Tensor, style: Tensor, *, up: bool = False) -> Tensor:
    kernel = s[f"{name}.weight"][None] * _dense(s, f"{name}.affine", style)[:, None, :, None, None]
    kernel = kernel / (kernel.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if up:  # here alone the kernel is turned around: a convolution as mathematics has it
        kernel = kernel.flip(3, 4)
        x = _filtered(_spread(x), s[f"{name}.resample_filter"], 3, 2, 4.0)
    else:
        x = F.pad(x, (1, 1, 1, 1))
    x = _correlated(x, kernel) + s[f"{name}.noise_strength"] * s[f"{name}.noise_const"]
    return _activated(x + s[f"{name}.bias"][:, None, None])


def _scaled(s: State, name: str, x: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    x = _correlated(x, weight[None].expand(len(x), -1, -1, -1, -1) / math.sqrt(weight[0].numel()))
    return x + s[f"{name}.bias"][:, None, None] if f"{name}.bias" in s else x


def _dense(s: State, name: str, x: Tensor, rate: float = 1.0) -> Tensor:
    weight = s[f"{name}.weight"]
    return x @ weight.T * (rate / math.sqrt(weight.shape[1])) + s[f"{name}.bias"] * rate


def _activated(x: Tensor) -> Tensor:
    return math.sqrt(2.0) * torch.where(x > 0.0, x, 0.2 * x)


def _doubled(x: Tensor, low_pass: Tensor) -> Tensor:
    return _filtered(_spread(x), low_pass, 2, 1, 4.0)


def _halved(x: Tensor, low_pass: Tensor) -> Tensor:
    return _filtered(x, low_pass, 1, 1)[:, :, ::2, ::2]


def _spread(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2 H, 2 W]: a zero after every pixel."""
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[:, :, ::2, ::2] = x
    return wide


def _filtered(x: Tensor, low_pass: Tensor, before: int, after: int, gain: float = 1.0) -> Tensor:
    """Each channel, with so many zeros before and after its rows and columns."""
    x = F.pad(x, (before, after, before, after))
    kernels = torch.eye(x.shape[1], dtype=x.dtype)[:, :, None, None] * low_pass.flip(0, 1)
    return gain * _correlated(x, kernels[None].expand(len(x), -1, -1, -1, -1))


def _correlated(x: Tensor, kernel: Tensor) -> Tensor:
    """[N, C_in, H, W], [N, C_out, C_in, k, k] -> [N, C_out, H - k + 1, W - k + 1], without padding."""
    size = kernel.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    products = [
        torch.einsum("noc,nchw->nohw", kernel[..., i, j], x[:, :, i : i + height, j : j + width])
        for i in range(size)
        for j in range(size)
    ]
    return torch.stack(products).sum(dim=0)
