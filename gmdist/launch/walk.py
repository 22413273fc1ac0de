"""Interpolations between samples, by the latents that they are drawn from; and mixtures of their styles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmdist import images, runs
from gmdist.errors import ConfigError
from gmdist.launch.sample import Drawer, SampleRequest, images_at_once, keys_of


def interpolate(run: str, request: SampleRequest, num_frames: int, overrides: Sequence[str] = ()) -> Tensor:
    """The frames from each sample of a request to the next, and from the last to the first: uint8 [N, F, H, W, C].

    Args:
        run: a run's folder, or one of its checkpoints.
        request: the samples, as `draw` takes it.
        num_frames: of each way: the sample that it begins with, and what lies between.
        overrides: `key=value` of the run's config.

    Raises:
        ConfigError: as `draw`; or a family that does not draw from latents.
    """
    if request.num_images < 2:
        raise ConfigError(f"--num-images: {request.num_images}; must be at least 2: --interpolate goes between images")
    if num_frames < 2:
        raise ConfigError(f"--interpolate: {num_frames}; must be at least 2")
    drawer = Drawer(run, request, overrides).to(runs.device())
    family = drawer.family
    with torch.inference_mode():
        starts = _latents(drawer, "--interpolate", 0)
        ends = starts.roll(-1, 0)
        shares = [i / num_frames for i in range(num_frames)]
        places = torch.stack([family.between(starts, ends, share) for share in shares], dim=1)
        parts = places.flatten(0, 1).split(images_at_once(drawer.config))
        frames = torch.cat([images.drawn_uint8(family.from_latents(part)) for part in parts])
    return frames.unflatten(0, (len(starts), num_frames))


def mix(run: str, request: SampleRequest, overrides: Sequence[str] = ()) -> Tensor:
    """A table of mixtures, uint8 [(N + 1)^2, H, W, C] row by row: on top the samples whose fine layers its columns
    have, on the left those whose coarse layers its rows have, and nothing in the corner.

    ConfigError as above, or for a family without styles.
    """
    drawer = Drawer(run, request, overrides).to(runs.device())
    family = drawer.family
    with torch.inference_mode():
        fine = _latents(drawer, "--mix-styles", 0)
        coarse = _latents(drawer, "--mix-styles", request.num_images)
        parts = fine.split(images_at_once(drawer.config))
        samples = torch.cat([family.from_latents(part) for part in parts])
        rows = [torch.cat([torch.ones_like(samples[:1]), samples])]
        for style in coarse.split(1):
            made = [family.mixed(style.expand(len(part), -1), part) for part in parts]
            rows.append(torch.cat([family.from_latents(style), *made]))
    return images.drawn_uint8(torch.cat(rows))


def _latents(drawer: Drawer, option: str, first: int) -> Tensor:
    """Where the samples of a request lie, from a number on [N, D]."""
    numbers = torch.cat(drawer.parts(first, first + drawer.request.num_images))
    latents = drawer.family.drawn_latents(keys_of(drawer.request, numbers), drawer.condition(numbers))
    if latents is None:
        raise ConfigError(
            f"{option}: family '{drawer.config.family_name}' draws from no latents that there is a way through"
        )
    return latents
