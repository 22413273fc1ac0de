"""Distances between images that follow what eyes see: of gradients and frequencies, and the learned one (LPIPS)."""

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.checks import nonnegative, one_of
from gmdist.errors import ConfigError
from gmdist.nets.blocks import at_least_fp32

NAMES = ("none", "gradient_frequency", "lpips")

_SMALLEST_LEVEL = 8  # pixels a side
_MAX_LEVELS = 4
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # Simonyan 2015, Tab. 1, column D
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_VGG_KEY = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_LINEAR_KEY = re.compile(r"lin(?:s\.)?(\d)\.model\.1\.weight")
_HOW_TO_GET = (
    "it needs VGG16 as torchvision saves it (vgg16-397923af.pth) and the linear weights of the lpips package "
    "(lpips/weights/v0.1/vgg.pth; found by itself where lpips is installed), or the same tensors as .safetensors"
)


@dataclass
class PerceptualConfig:
    """The perceptual part of a reconstruction's error."""

    name: str = "gradient_frequency"  # none, gradient_frequency or lpips
    weight: float = 1.0  # against the mean absolute error of a pixel
    # lpips: a file, or a folder with the files, on every worker's machine. Read when the run starts; from then on the
    # weights are in its checkpoints.
    path: str | None = field(default=None, metadata={"location": True})

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := one_of(NAMES, name=self.name) or nonnegative(weight=self.weight):
            return problem
        if self.name == "lpips" and self.path is None:
            return f"path: missing; must be a folder or a file for lpips: {_HOW_TO_GET}"
        if self.name != "lpips" and self.path is not None:
            return f"path: '{self.path}'; goes with name lpips only"
        if self.name == "lpips" and image_size < 16:
            return f"name: 'lpips'; its network halves images four times: sides must be at least 16, not {image_size}"
        return None


class GradientFrequency(nn.Module):
    """A distance of edges and of textures that needs no trained network.

    At each level of a pyramid, which halves the images down to 8 pixels a side, at most 3 times, it adds

    - the mean absolute difference of the gradients along rows and columns (Mathieu 2016, Eq. 6, alpha = 1), which a
      blurred edge raises more than it raises the error of pixels;
    - the mean absolute difference of the real and imaginary parts of the spectra (Cho 2021, Eq. 4): natural images have
      little power in high frequencies, and in this sum they count as much as low ones. Half a spectrum has one of a
      frequency and its conjugate, but both where a row is constant or alternates, so that these count twice.

    Both have the scale of the error of a pixel: the transform keeps sums of squares. The result is the levels' mean.
    """

    def forward(self, image: Tensor, original: Tensor) -> Tensor:
        """Images [N, C, H, W] of any size and number of channels -> distances [N], at least fp32."""
        error = at_least_fp32(image) - at_least_fp32(original)  # all that follows is linear up to the absolute values
        levels = [self._level(error)]
        while len(levels) < _MAX_LEVELS and min(error.shape[2:]) >= 2 * _SMALLEST_LEVEL:
            error = F.avg_pool2d(error, 2)
            levels.append(self._level(error))
        return torch.stack(levels).mean(0)

    def _level(self, error: Tensor) -> Tensor:
        """[N, C, h, w] -> [N]."""
        gradients = [error.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3) if error.shape[dim] > 1]
        spectrum = torch.view_as_real(torch.fft.rfft2(error, norm="ortho"))  # [N, C, h, w // 2 + 1, 2]
        return sum(gradients, spectrum.abs().mean(dim=(1, 2, 3, 4)))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG16 (Zhang 2018, Eq. 1), version 0.1. It is never trained.

    Its weights are NaN until `load` or a checkpoint fills them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for widths in _VGG16:
            for out in widths:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
                width = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # numbered as torchvision's
        self.linear = nn.ParameterList([torch.full((widths[-1],), torch.nan) for widths in _VGG16])
        # From [-1, 1] to what VGG16 was trained on: ImageNet's mean and deviation, doubled and moved.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, original: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1], C = 1 or 3, sides of at least 16 -> distances [N], at least fp32.

        Gradients reach `image` only.
        """
        with torch.no_grad():
            wanted = self._features(original)
        distances = []
        for found, target, weights in zip(self._features(image), wanted, self.linear, strict=True):
            difference = (found - target).square() * weights[:, None, None]  # [N, C_l, h, w]
            distances.append(difference.sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(distances).sum(0)

    def _features(self, image: Tensor) -> list[Tensor]:
        """The features of five layers, of unit length at each pixel: each [N, C_l, h_l, w_l]."""
        x = (image.expand(-1, 3, -1, -1) - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in _TAPS:
                wide = at_least_fp32(x)
                # Squared before the root: where all features are zero, the root's own slope is infinite.
                length = (wide.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
                found.append(wide / (length + 1e-10))
        return found

    @torch.no_grad()
    def load(self, path: str) -> None:
        """Read the weights from a file or a folder's files: .safetensors, or .pt and .pth that hold tensors only.

        They may be named as torchvision's vgg16 and the lpips package's vgg.pth name them, or as the state of the whole
        network of the lpips package.

        Raises:
            ConfigError: a tensor is missing or has another shape, or a file cannot be read.
        """
        found = _read_all(path)
        if not any(name.startswith("linear") for name in found):
            found |= _bundled()
        for name, parameter in self.named_parameters():
            if name not in found:
                raise ConfigError(f"family.perceptual.path: '{path}'; has no {name} of LPIPS: {_HOW_TO_GET}")
            value = found[name].squeeze() if name.startswith("linear") else found[name]
            if value.shape != parameter.shape:
                shapes = list(value.shape), list(parameter.shape)
                raise ConfigError(
                    f"family.perceptual.path: '{path}'; its {name} of LPIPS is {shapes[0]}, not {shapes[1]}"
                )
            parameter.copy_(value)


def make_perceptual(config: PerceptualConfig) -> GradientFrequency | LPIPS | None:
    """The distance that a config names; None for "none"."""
    if config.name == "lpips":
        return LPIPS()
    return GradientFrequency() if config.name == "gradient_frequency" else None


def _read_all(path: str) -> dict[str, Tensor]:
    """The tensors of LPIPS in a file or folder, by their names here."""
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in (".safetensors", ".pt", ".pth"))
    if not files or not place.exists():
        raise ConfigError(
            f"family.perceptual.path: '{path}'; there is no such file, or no weights in the folder: {_HOW_TO_GET}"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _renamed(_read(file))
    return found


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for a damaged file and for one that holds more than tensors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"family.perceptual.path: '{file}'; cannot be read as tensors ({reason}): {_HOW_TO_GET}"
        ) from error
    return state if isinstance(state, dict) else {}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if match := _VGG_KEY.fullmatch(key):
            found[f"features.{match[1]}.{match[2]}"] = value
        elif match := _LINEAR_KEY.fullmatch(key):
            found[f"linear.{match[1]}"] = value
    return found


def _bundled() -> dict[str, Tensor]:
    """The linear weights that the lpips package brings, where it is installed; none of its code runs."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        return {}
    file = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    return _renamed(_read(file)) if file.exists() else {}
