"""What a run makes of images of one domain: the same in the other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gmdist import images, runs
from gmdist.data.batch import as_floats
from gmdist.data.config import DataConfig
from gmdist.data.decode import UndecodableError
from gmdist.data.members import image_of
from gmdist.data.sources import open_source
from gmdist.errors import ConfigError, DataError
from gmdist.families import CATALOGUE
from gmdist.families.family import DIRECTIONS, Family
from gmdist.launch.sample import check_out, images_at_once, is_grid, save


def translate(run: str, direction: str, source: str, num_images: int, out: str, overrides: Sequence[str] = ()) -> str:
    """Translate images by a checkpoint's averaged weights, and save them as samples are saved.

    Args:
        run: a run's folder (its newest sound checkpoint is used), or one of its checkpoints.
        direction: one of DIRECTIONS.
        source: a local folder of images, which are taken in the order of their names; or a folder or s3:// prefix of
            shards, in their order.
        num_images: at most; those that cannot be decoded are left out.
        out: NAME.png: a grid, each image beside its translation; else a folder: one PNG a translation, numbered.
        overrides: `key=value` of the run's config, such as data.resize, by which the images are cut and resized.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: no such run or direction, or a family that does not translate.
        DataError, CheckpointError: no images, or of another size than the run's; no sound checkpoint.
        DivergedError: weights that give no numbers.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"--translate: '{direction}'; must be one of {', '.join(DIRECTIONS)}")
    if num_images < 1:
        raise ConfigError(f"--num-images: {num_images}; must be at least 1")
    config = runs.read_config(run, overrides)
    able = [name for name, (kind, _) in CATALOGUE.items() if kind.translate is not Family.translate]
    if config.family_name not in able:
        raise ConfigError(
            f"--translate: family '{config.family_name}' translates no images; those that do: "
            f"{', '.join(able) or 'none'}"
        )
    runs.use_storage(config)
    real, left_out = _read(config.data, source, num_images)
    check_out(out, len(real))  # nothing that an earlier command has made of more images may stay among these
    _, family = runs.open_run(run, config)
    device = runs.device()
    family = family.to(device)
    with torch.inference_mode():
        parts = [family.translate(as_floats(part.to(device)), direction) for part in real.split(images_at_once(config))]
    made = torch.cat([images.drawn_uint8(part) for part in parts])
    written = save(torch.cat([real, made], dim=2) if is_grid(out) else made, len(made), out)
    return written + (f", {len(left_out)} that cannot be decoded left out ({left_out[0]})" if left_out else "")


def _read(config: DataConfig, source: str, count: int) -> tuple[Tensor, list[str]]:
    """The first images that can be decoded, uint8 [N, H, W, C], and what is wrong with those before them that cannot.

    DataError if there is none, or one is of another size.
    """
    found, left_out = [], list[str]()
    try:
        for raw in open_source(source).by_name():
            try:
                members = {extension: memoryview(content) for extension, content in raw.read().items()}
                found.append(image_of(config, members, None, None))
            except (UndecodableError, OSError) as error:
                left_out.append(f"{raw.name}: {error}")
            except DataError as error:
                raise DataError(f"{raw.name}: {error}") from error
            if len(found) == count:
                break
    except DataError as error:
        raise DataError(f"--images: {error}") from error
    if not found:
        reason = f"none of its images can be decoded ({left_out[0]})" if left_out else "no images in it"
        raise DataError(f"--images: {source}: {reason}")
    return torch.from_numpy(np.stack(found)), left_out
