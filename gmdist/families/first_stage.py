"""The frozen run that a second stage is trained on top of: opened, and held against the second's images."""

from typing import TypeVar

from gmdist.errors import CheckpointError, ConfigError
from gmdist.families.autoencoder_kl import AutoencoderKL
from gmdist.families.family import Surroundings
from gmdist.families.tokenizer import Tokenizer

_First = TypeVar("_First", AutoencoderKL, Tokenizer)


def open_first_stage(run: str, kind: type[_First], what: str, surroundings: Surroundings) -> _First:
    """The family of family.first_stage.

    Args:
        run: its folder, or a checkpoint of it.
        kind: what the second stage can be trained on.
        what: that in words, for errors.
        surroundings: of the second stage.

    Raises:
        ConfigError: there is no such run, or one of another kind, or of other images.
        CheckpointError: it has no sound checkpoint.
    """
    try:
        first = surroundings.open_run(run)
    except ConfigError as error:
        raise ConfigError(f"family.first_stage: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"family.first_stage: {error}") from error
    if not isinstance(first, kind):
        raise ConfigError(f"family.first_stage: {run} is not a run of {what}")
    wanted = surroundings.image_size, surroundings.image_channels
    if (first.image_size, first.image_channels) != wanted:
        raise ConfigError(
            f"family.first_stage: {run} was trained on {first.image_channels} channels of {first.image_size} pixels; "
            f"data.channels and data.image_size are {wanted[1]} and {wanted[0]}"
        )
    return first
