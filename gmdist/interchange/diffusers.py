"""Folders of diffusers' weights, read and written: config.json and diffusion_pytorch_model.safetensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.interchange.configs import config_json, spec_of
from gmdist.interchange.names import OF_LOSSES, Link, links, modern_name, shapes_there, to_ours, to_theirs
from gmdist.interchange.spec import NetworkSpec

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp16", ".bf16")
_DTYPES = ("F16", "BF16", "F32", "F64")
_NAMED = 10  # tensors that an error lists


def read_folder(path: str | Path) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """The network that a folder of diffusers holds.

    Args:
        path: with config.json and diffusion_pytorch_model.safetensors, whole or in shards with their index.

    Returns:
        What it is, and its state dict under our names, in fp32: `spec.build().load_state_dict(state)`.

    Raises:
        ConfigError: a file that is missing or unsound, a network that ours cannot be, or tensors that are missing, not
            known, or of another shape.
    """
    folder = Path(path)
    with _opened(folder) as (spec, found, files):
        state, unequal = to_ours(lambda name: _read(files[name], folder), found)
    if unequal:
        raise ConfigError(
            f"{folder}: {_some(unequal)} differ from the first block's; gmdist's DiT has one embedding for all blocks"
        )
    return spec, state


def read_spec(path: str | Path) -> NetworkSpec:
    """The network that a folder of diffusers holds; raises as `read_folder` does, for all but the tensors' values."""
    with _opened(Path(path)) as (spec, _, _):
        return spec


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[NetworkSpec, list[Link], dict[str, tuple[Any, str]]]]:
    """A network, the places of its tensors, and by present name the open file of each and its name there."""
    values = _read_json(folder / _CONFIG)
    try:
        spec = spec_of(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / _CONFIG}: {error}") from error
    outline = spec.outline()
    found = links(spec, outline)
    with ExitStack() as stack:
        files: dict[str, tuple[Any, str]] = {}
        for file in _weight_files(folder):
            opened = _open(file, stack)
            names = list(opened.keys())
            files.update((modern_name(name), (opened, name)) for name in names)
        slices = {name: opened.get_slice(key) for name, (opened, key) in files.items()}
        _check_shapes(folder, {name: s.get_shape() for name, s in slices.items()}, shapes_there(outline, found))
        for name, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise ConfigError(f"{folder}: {name} is {part.get_dtype()}; must be one of {', '.join(_DTYPES)}")
        yield spec, found, files


def write_folder(
    path: str | Path, spec: NetworkSpec, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write a network as diffusers' `from_pretrained` loads it: the weights, then config.json.

    Args:
        path: a local folder, which is made.
        spec: what the network is.
        state: its state dict.
        dtype: of the weights that are written.

    Raises:
        ConfigError: diffusers has no such network, or the state dict is another network's.
    """
    config, tensors = to_diffusers(spec, state)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def to_diffusers(spec: NetworkSpec, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A network's config.json, and its tensors under diffusers' names; raises as `write_folder` does."""
    config = config_json(spec)
    outline = spec.outline()
    wanted = {name: list(tensor.shape) for name, tensor in outline.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if name not in OF_LOSSES}
    _check_shapes("the state dict", {name: list(tensor.shape) for name, tensor in state.items()}, wanted)
    return config, to_theirs(state, links(spec, outline))


def _weight_files(folder: Path) -> list[Path]:
    for variant in _VARIANTS:
        whole = folder / f"{_WEIGHTS}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        for index in (f"{_WEIGHTS}.safetensors.index{variant}.json", f"{_WEIGHTS}{variant}.safetensors.index.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
    if list(folder.glob("*.bin")) or list(folder.glob("*.ckpt")):
        raise ConfigError(
            f"{folder}: the weights are pickles (.bin or .ckpt), which can run any code where they are read; convert "
            f"them to {_WEIGHTS}.safetensors"
        )
    raise ConfigError(f"{folder}: no {_WEIGHTS}.safetensors, and no index of its shards")


def _shards(index: Path) -> list[Path]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{index}: no weight_map of tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ConfigError(f"{index}: '{name}' is not a file beside it")
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give a folder of diffusers' weights") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return values


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a sound safetensors file ({error})") from error


def _read(place: tuple[Any, str], folder: Path) -> Tensor:
    opened, key = place
    try:
        return opened.get_tensor(key).to(torch.float32)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: {key} cannot be read ({error})") from error


def _check_shapes(where: str | Path, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """ConfigError that names what is missing, what is not known, and what has another shape."""
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        problems.append(f"{len(unknown)} not known: {_some(unknown)}")
    common = sorted(found.keys() & wanted.keys())
    wrong = [f"{name} {found[name]} for {wanted[name]}" for name in common if list(found[name]) != wanted[name]]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if problems:
        raise ConfigError(f"{where}: tensors do not fit the config: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
