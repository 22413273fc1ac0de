"""Ways through the latents that samples are drawn from, and the styles of some with those of others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmdist import images, runs
from gmdist.config import Config
from gmdist.errors import ConfigError
from gmdist.families.family import Family
from gmdist.launch.sample import (
    SampleRequest,
    asked,
    check_conditions,
    check_request,
    images_at_once,
    keys_of,
    with_sampler,
)


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
    config, family = _opened(run, request, overrides)
    with torch.inference_mode():
        starts = _latents(config, family, request, "--interpolate")
        ends = starts.roll(-1, 0)
        shares = [i / num_frames for i in range(num_frames)]
        places = torch.stack([family.between(starts, ends, share) for share in shares], dim=1)
        parts = places.flatten(0, 1).split(images_at_once(config))
        frames = torch.cat([images.drawn_uint8(family.from_latents(part)) for part in parts])
    return frames.unflatten(0, (len(starts), num_frames))


def mix(run: str, request: SampleRequest, overrides: Sequence[str] = ()) -> Tensor:
    """A table of mixtures, uint8 [(N + 1)^2, H, W, C] row by row: on top the samples whose fine layers its columns
    have, on the left those whose coarse layers its rows have, and nothing in the corner.

    ConfigError as above, or for a family without styles.
    """
    config, family = _opened(run, request, overrides)
    with torch.inference_mode():
        fine = _latents(config, family, request, "--mix-styles")
        coarse = _latents(config, family, request, "--mix-styles", start=request.num_images)
        parts = fine.split(images_at_once(config))
        samples = torch.cat([family.from_latents(part) for part in parts])
        rows = [torch.cat([torch.ones_like(samples[:1]), samples])]
        for style in coarse.split(1):
            made = [family.mixed(style.expand(len(part), -1), part) for part in parts]
            rows.append(torch.cat([family.from_latents(style), *made]))
    return images.drawn_uint8(torch.cat(rows))


def _opened(run: str, request: SampleRequest, overrides: Sequence[str]) -> tuple[Config, Family]:
    config = with_sampler(runs.read_config(run, overrides), request)
    check_request(config, request)
    _, family = runs.open_run(run, config)
    check_conditions(family, request)
    return config, family.to(runs.device())


def _latents(config: Config, family: Family, request: SampleRequest, option: str, start: int = 0) -> Tensor:
    """Where the samples of a request lie, from a number on [N, D]."""
    device = runs.device()
    numbers = torch.arange(start, start + request.num_images, device=device)
    latents = family.drawn_latents(keys_of(request, numbers), asked(request, numbers, config, family))
    if latents is None:
        raise ConfigError(f"{option}: family '{config.family_name}' draws from no latents that there is a way through")
    return latents
