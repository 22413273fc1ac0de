"""A run's averaged weights in files that others read: one safetensors file, or a folder of diffusers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from gmdist import runs, storage
from gmdist.config import Config
from gmdist.errors import ConfigError
from gmdist.families.codes import tables_of_codes
from gmdist.families.family import Family
from gmdist.interchange.configs import config_json
from gmdist.interchange.diffusers import write_folder
from gmdist.interchange.pipelines import Network, write_pipeline

WEIGHTS = "model.safetensors"
_LAST = ("model_index.json", "config.json", runs.CONFIG_NAME)  # without it, a folder is not taken for a whole one


def export(run: str, destination: str, format: str, overrides: Sequence[str] = ()) -> str:
    """Write the averaged weights of a run's newest sound checkpoint, or of the one that is named.

    Args:
        run: a run's folder, or one of its checkpoints.
        destination: an empty folder or prefix, or one that is not there.
        format: a key of `FORMATS`.
        overrides: `key=value` of the run's config, such as another sampler.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: no such run, a destination that holds something, a model that the format cannot hold.
        CheckpointError: no sound checkpoint.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format: '{format}'; must be one of {', '.join(FORMATS)}")
    destination = storage.absolute(destination)
    config = runs.read_config(run, overrides)
    runs.use_storage(config)
    if storage.exists(destination):
        raise ConfigError(f"{destination}: is a file; choose a folder that is not there")
    if names := storage.list_names(destination):
        raise ConfigError(f"{destination}: holds other files already ({names[0]}, ...): choose another folder")
    meta, family = runs.open_run(run, config)
    with tempfile.TemporaryDirectory(prefix="gmdist-export-") as temporary:
        folder = Path(temporary)
        what = FORMATS[format](folder, config, family)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        # The top folder's config comes last, and in each folder it comes after the weights.
        for file in sorted(files, key=lambda path: (str(path) in _LAST, path.suffix == ".json")):
            storage.copy_from_local(str(folder / file), storage.join(destination, *file.parts))
    return f"{destination}: step {meta['step']} as {what}"


def _safetensors(folder: Path, config: Config, family: Family) -> str:
    """Parameters and buffers under the family's own names, and the tables of its codebooks."""
    state = family.state_dict() | tables_of_codes(family)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / runs.CONFIG_NAME).write_text(config.to_yaml())
    return f"{len(state)} tensors of {config.family_name}"


def _diffusers(folder: Path, config: Config, family: Family) -> str:
    """A folder for `from_pretrained`."""
    try:
        model = family.for_diffusers()
        if isinstance(model, Network):
            write_folder(folder, model.spec, model.state)
            return f"diffusers' {config_json(model.spec)['_class_name']}"
        write_pipeline(folder, model)
        call = ", ".join(f"{key}={value}" for key, value in model.call.items())
        return f"diffusers' {model.kind}, which samples as the run with {call}"
    except ConfigError as error:
        raise ConfigError(f"--format: 'diffusers'; {error}; --format safetensors holds every family") from error


FORMATS = {"safetensors": _safetensors, "diffusers": _diffusers}
