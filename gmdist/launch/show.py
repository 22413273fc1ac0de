"""What a run makes of real images: reconstructions, ways from one to the next, one latent dimension after another."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gmdist import images, runs
from gmdist.config import Config
from gmdist.data.unpaired import open_held_out, open_training
from gmdist.errors import ConfigError, DataError
from gmdist.families.family import Batch, Family
from gmdist.launch.sample import images_at_once

KINDS = ("reconstructions", "interpolations", "traversals")
_COLUMNS = 10
_SPREAD_IMAGES = 256  # that tell how far each latent dimension reaches
_REACH = 3.0  # standard deviations to both sides


def show(run: str, kind: str, num_rows: int, overrides: Sequence[str] = ()) -> Tensor:
    """A picture a row, of the first images of the held-out data, or of the training data where there is none.

    Args:
        run: a run's folder, or one of its checkpoints.
        kind: "reconstructions": an image, and what its latent is decoded to. "interpolations": from an image to the
            next, in equal steps of the way between their latents. "traversals": one image, a row for each latent
            dimension, which goes from three standard deviations below its mean over images to three above.
        num_rows: at most; of traversals, those dimensions that vary most.
        overrides: `key=value` of the run's config.

    Returns:
        uint8 [R, H, W', C].

    Raises:
        ConfigError: there is no such kind, or the run's family has nothing of the kind.
        DataError: too few images.
    """
    if kind not in KINDS:
        raise ConfigError(f"--show: '{kind}'; must be one of {', '.join(KINDS)}")
    if num_rows < 1:
        raise ConfigError(f"--num-images: {num_rows}; must be at least 1")
    config = runs.read_config(run, overrides)
    _, family = runs.open_run(run, config)
    device = runs.device()
    family = family.to(device)
    at_once = images_at_once(config)
    with torch.inference_mode():
        if kind == "reconstructions":
            rows = _reconstructions(family, _first(config, num_rows, device, 1), at_once)
        elif kind == "interpolations":
            rows = _interpolations(family, _first(config, num_rows + 1, device, 2), at_once)
        else:
            rows = _traversals(family, _first(config, _SPREAD_IMAGES, device, 2), num_rows, at_once)
    if rows is None:
        raise ConfigError(f"--show: '{kind}'; family '{config.family_name}' has no latents that this could show")
    return images.drawn_uint8(rows)


def _first(config: Config, count: int, device: torch.device, least: int) -> Batch:
    data = open_held_out(config.data) or open_training(config.data)
    if data.num_samples < least:
        key = "data.train" if config.data.test is None else "data.test"
        raise DataError(f"{key}: has {data.num_samples} images; --show needs at least {least} here")
    return data.first(min(count, data.num_samples)).batch_on(device)


def _reconstructions(family: Family, batch: Batch, at_once: int) -> Tensor | None:
    """Originals beside their reconstructions [N, C, H, 2 W]."""
    found = _in_parts(family.reconstruct, batch, at_once)
    return None if found is None else torch.cat([batch["image"], found], dim=3)


def _in_parts(make: Callable[[Batch], Tensor | None], batch: Batch, at_once: int) -> Tensor | None:
    """What a family makes of a batch [N, ...], some images at once; None where it makes nothing of the kind."""
    parts = []
    for i in range(0, len(batch["key"]), at_once):
        part = make({name: value[i : i + at_once] for name, value in batch.items()})
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts)


def _decoded(family: Family, latents: Tensor, at_once: int) -> Tensor:
    """The images [N, C, H, W] of latents [N, D], some at once."""
    return torch.cat([family.from_latents(part) for part in latents.split(at_once)])


def _interpolations(family: Family, batch: Batch, at_once: int) -> Tensor | None:
    """Both images of a pair, and between them what their latents' mixtures are decoded to [N - 1, C, H, 12 W]."""
    latents = _in_parts(family.latents, batch, at_once)
    if latents is None:
        return None
    shares = torch.linspace(0.0, 1.0, _COLUMNS).tolist()
    decoded = [_decoded(family, torch.lerp(latents[:-1], latents[1:], share), at_once) for share in shares]
    return torch.cat([batch["image"][:-1], *decoded, batch["image"][1:]], dim=3)


def _traversals(family: Family, batch: Batch, num_rows: int, at_once: int) -> Tensor | None:
    """A row for each of the dimensions that vary most [rows, C, H, columns W]."""
    latents = _in_parts(family.latents, batch, at_once)
    if latents is None:
        return None
    spread, mean = torch.std_mean(latents, dim=0)
    dimensions = spread.argsort(descending=True, stable=True)[:num_rows]
    rows = latents[:1].repeat(len(dimensions), 1)
    which = torch.arange(len(dimensions), device=latents.device), dimensions
    decoded = []
    for place in torch.linspace(-_REACH, _REACH, _COLUMNS).tolist():
        rows[which] = mean[dimensions] + place * spread[dimensions]
        decoded.append(_decoded(family, rows, at_once))
    return torch.cat(decoded, dim=3)
