"""Images from a run: a grid, or one PNG each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gmdist import images, runs, storage
from gmdist.config import Config
from gmdist.data.batch import as_floats
from gmdist.data.decode import UndecodableError, decode_image
from gmdist.errors import ConfigError
from gmdist.evaluator import open_captions
from gmdist.families import CATALOGUE
from gmdist.families.family import Condition, Family

_MOST_AT_ONCE, _PIXELS_AT_ONCE = 64, 64 * 256 * 256


@dataclass(frozen=True)
class SampleRequest:
    """What to draw."""

    num_images: int
    label: int | None = None  # class of all images; None: all classes in turn
    prompt: str | None = None  # what all images show, of a run with captions; None: nothing in particular
    seed: int = 0  # another seed, other images
    num_steps: int | None = None  # of the sampler; None: the run's own setting
    guidance: float | None = None  # strength of the guidance; None: the run's own setting
    truncation: float | None = None  # towards the mean style, 0 to 1; None: the run's own setting
    complete: str | None = None  # an image file with the first rows of all images; None: they are drawn too


def with_sampler(config: Config, request: SampleRequest) -> Config:
    """The config with a request's settings of the sampler; ConfigError where a family has none, or values cannot be."""
    sampler = getattr(getattr(config.family, "diffusion", config.family), "sampler", None)
    settings = [
        ("steps", sampler, "num_steps", request.num_steps, "sampler with steps"),
        ("guidance", sampler, "guidance", request.guidance, "sampler with guidance"),
        ("truncation", config.family, "truncation", request.truncation, "truncation"),
    ]
    for flag, section, key, value, what in settings:
        if value is None:
            continue
        if not hasattr(section, key):
            raise ConfigError(f"--{flag}: family '{config.family_name}' has no {what} to set")
        setattr(section, key, value)
    problem = config.family.problem(config.data.image_size)
    if problem:
        raise ConfigError(f"family.{problem}")
    return config


class Drawer:
    """A run's averaged weights, set up to draw what a request asks for."""

    def __init__(self, run: str, request: SampleRequest, overrides: Sequence[str] = ()) -> None:
        """Open the run, with `key=value` of its config changed; ConfigError for a request that cannot be."""
        self.request = request
        self.config = with_sampler(runs.read_config(run, overrides), request)
        _check_request(self.config, request)
        meta, self.family = runs.open_run(run, self.config)
        self.step: int = meta["step"]
        _check_conditions(self.family, request)
        self.rows = None if request.complete is None else _first_rows(request.complete, self.config.data.channels)
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> "Drawer":
        """Move it to a device."""
        self.family, self._device = self.family.to(device), device
        return self

    def parts(self, first: int, stop: int) -> tuple[Tensor, ...]:
        """The numbers from one to another, those of images that are drawn together [N]."""
        return torch.arange(first, stop, device=self._device).split(images_at_once(self.config))

    def condition(self, numbers: Tensor) -> Condition:
        """What the images of these numbers [N] are to show."""
        label, prompt, classes = self.request.label, self.request.prompt, self.config.data.num_classes
        labels = None
        if classes and "label" in self.family.conditions:
            labels = torch.remainder(numbers, classes) if label is None else torch.full_like(numbers, label)
        return Condition(labels, None if prompt is None else (prompt,) * len(numbers))

    def pixels(self, numbers: Tensor, condition: Condition) -> Tensor:
        """The images of these numbers [N], uint8 [N, H, W, C] on the CPU: the same ones for the same request."""
        keys, rows = keys_of(self.request, numbers), self.rows
        with torch.inference_mode():
            if rows is None:
                return images.drawn_uint8(self.family.sample(keys, condition))
            return images.drawn_uint8(_completed(self.family, self.request, rows, keys, condition))


def draw(
    run: str,
    request: SampleRequest,
    overrides: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Images uint8 [H, W, C] of a run's averaged weights, with `key=value` of its config changed.

    They are drawn as they are asked for, some together: one who saves them holds no more than those. The same request
    gives the same images. `on_progress` is called with (images taken, images in all).
    """
    drawer = Drawer(run, request, overrides).to(runs.device())
    done = 0
    for part in drawer.parts(0, request.num_images):
        yield from drawer.pixels(part, drawer.condition(part))
        done += len(part)
        on_progress(done, request.num_images)


def draw_compared(run: str, num_images: int) -> Tensor:
    """The first images that an evaluation of a run compares, uint8 [N, H, W, C]: classes in turn, or under captions."""
    device = runs.device()
    drawer = Drawer(run, SampleRequest(num_images)).to(device)
    parts = drawer.parts(0, num_images)
    captioned = open_captions(drawer.config, device)
    conditions = map(drawer.condition, parts) if captioned is None else captioned(list(parts))
    return torch.cat([drawer.pixels(part, condition) for part, condition in zip(parts, conditions, strict=True)])


def images_at_once(config: Config) -> int:
    """How many images go through a run's networks together: fewer of large ones, for the memory that they take."""
    return max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // config.data.image_size**2))


def is_compared(run: str) -> bool:
    """Whether there are images to draw and real ones beside them: not of a run that reads latents or draws none."""
    config = runs.read_config(run)
    return config.data.image and CATALOGUE[config.family_name][0].sample is not Family.sample


def _check_request(config: Config, request: SampleRequest) -> None:
    """ConfigError for numbers that cannot be."""
    classes = config.data.num_classes or 0
    if request.num_images < 1:
        raise ConfigError(f"--num-images: {request.num_images}; must be at least 1")
    if not 0 <= request.seed < 2**31:
        raise ConfigError(f"--seed: {request.seed}; must be between 0 and {2**31 - 1}")
    if request.label is not None and not 0 <= request.label < classes:
        valid = f"labels are 0 to {classes - 1}" if classes else "the run has no classes"
        raise ConfigError(f"--label: {request.label}; {valid}")


def keys_of(request: SampleRequest, numbers: Tensor) -> Tensor:
    """The keys of a request's images, int64 [N], by their numbers [N]."""
    return numbers + (request.seed << 32)


def _check_conditions(family: Family, request: SampleRequest) -> None:
    """ConfigError for what the family would not follow."""
    told = {"label": "classes", "prompt": "captions"}
    for name, what in told.items():
        value = getattr(request, name)
        if value is not None and name not in family.conditions:
            others = " and ".join(f"--{other}" for other in family.conditions) or "nothing of the kind"
            raise ConfigError(f"--{name}: '{value}'; the run's model is not told {what}: it takes {others}")
    if request.guidance is not None and not family.conditions:
        raise ConfigError(f"--guidance: {request.guidance}; the run's model is told nothing that it could follow")


def _first_rows(location: str, channels: int) -> Tensor:
    """The pixels of an image file as families take them, [1, C, R, W]; ConfigError if it cannot be read."""
    try:
        pixels = decode_image(storage.read(location), channels)
    except FileNotFoundError as error:
        raise ConfigError(f"--complete: {location}; there is no such file") from error
    except storage.NotAFileError as error:
        raise ConfigError(f"--complete: {error}") from error
    except UndecodableError as error:
        raise ConfigError(f"--complete: {location}; {error}") from error
    return as_floats(torch.from_numpy(np.array(pixels))[None])


def _completed(family: Family, request: SampleRequest, rows: Tensor, keys: Tensor, condition: Condition) -> Tensor:
    """Images [N, C, H, W] for keys [N] that begin with the rows [1, C, R, W]."""
    try:
        return family.complete(rows.to(keys.device).expand(len(keys), -1, -1, -1), keys, condition)
    except ConfigError as error:
        raise ConfigError(f"--complete: {request.complete}; {error}") from error


def is_grid(out: str) -> bool:
    """Whether images that are saved there are one grid, and not a folder."""
    return out.lower().endswith(".png")


def check_out(out: str, num_images: int) -> None:
    """ConfigError for a name that is neither a grid's nor a folder's, or a folder that holds other files."""
    if out.lower().endswith((".jpg", ".jpeg", ".webp", ".gif")):
        raise ConfigError(f"--out: {out}; grids are PNG files: use a name that ends in .png, or a folder's")
    if not is_grid(out):
        others = sorted(set(storage.list_names(out)) - set(_names(num_images)))
        if others:  # whoever reads the folder would take them for samples
            raise ConfigError(f"--out: {out}; holds other files already ({others[0]}, ...): choose another folder")


def _names(num_images: int) -> list[str]:
    width = max(5, len(str(num_images - 1)))
    return [f"{number:0{width}d}.png" for number in range(num_images)]


def save(pictures: Iterable[Tensor], num_images: int, out: str, columns: int | None = None) -> str:
    """Write so many images uint8 [H, W, C] as a grid (a name that ends in .png) or one PNG each (any other: a folder).

    Those of a folder are written as they come, and held no longer. A grid has so many columns; None: as many as look
    well.

    Returns:
        A line that says what was written.
    """
    if is_grid(out):
        storage.write(out, images.png(images.grid(torch.stack(list(pictures)), columns)))
        return f"{out}: {num_images} images"
    locations = [storage.join(out, name) for name in _names(num_images)]
    for location, picture in zip(locations, pictures, strict=True):
        if location == locations[0]:
            for earlier in locations:  # of another command: if this one is stopped, none is among its own
                storage.delete(earlier)
        storage.write(location, images.png(picture))
    return f"{out}/: {num_images} images"
