"""Folders of diffusers' weights, read and written: config.json and diffusion_pytorch_model.safetensors."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.interchange.configs import config_json, spec_of
from gmdist.interchange.names import (
    OF_LOSSES,
    Link,
    copies_are_equal,
    links,
    modern_name,
    shapes_there,
    to_ours,
    to_theirs,
)
from gmdist.interchange.spec import NetworkSpec
from gmdist.interchange.tensors import check_dtypes, open_file, read_tensor, shape_problems
from gmdist.nets.dit import DiTConfig

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp16", ".bf16")
_MOST_NAMED = 5  # files in an error


def read_folder(
    path: str | Path, block_embeddings: bool = False, is_read: Callable[[str], bool] = lambda name: True
) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """The network that a folder of diffusers holds.

    Args:
        path: with config.json and diffusion_pytorch_model.safetensors, whole or in shards with their index.
        block_embeddings: of a DiT: whether it is read as one that has them even where those of all blocks are equal.
        is_read: whether the tensor of this name, ours, is wanted; of the others, values are not looked at.

    Returns:
        What it is, and its state dict under our names, in fp32: `spec.build().load_state_dict(state)`.

    Raises:
        ConfigError: a file that is missing or unsound, a network that ours cannot be, or tensors that are missing, not
            known, of another shape, or not finite.
    """
    with _opened(Path(path), block_embeddings) as (spec, found, read):
        return spec, to_ours(read, [link for link in found if is_read(link.ours)])


@contextmanager
def _opened(folder: Path, block_embeddings: bool) -> Iterator[tuple[NetworkSpec, list[Link], Callable[[str], Tensor]]]:
    """A network, the places of its tensors, and what reads one by its present name there."""
    values = read_json(folder / _CONFIG)
    try:
        spec = spec_of(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / _CONFIG}: {error}") from error
    outline = spec.outline()
    found = links(spec, outline)
    with ExitStack() as stack:
        files: dict[str, tuple[Any, str]] = {}
        for file in _weight_files(folder):
            opened = open_file(file, stack)
            for name in list(opened.keys()):
                _, other = files.get(modern_name(name), (None, name))
                if other != name:
                    raise ConfigError(
                        f"{folder}: {name} and {other} are one tensor under two names; must be there once"
                    )
                files[modern_name(name)] = opened, name
        slices = {name: opened.get_slice(key) for name, (opened, key) in files.items()}
        _check_shapes(folder, {name: s.get_shape() for name, s in slices.items()}, shapes_there(outline, found))
        check_dtypes({name: s.get_dtype() for name, s in slices.items()}, folder)

        def read(name: str) -> Tensor:
            return read_tensor(*files[name], folder)

        # Of blocks' embeddings, the config does not say whether they are one.
        if isinstance(spec.config, DiTConfig) and (block_embeddings or not copies_are_equal(read, found)):
            spec = replace(spec, config=replace(spec.config, block_embeddings=True))
            found = links(spec, spec.outline())
        yield spec, found, read


def write_folder(path: str | Path, spec: NetworkSpec, state: Mapping[str, Tensor]) -> None:
    """Write a network as diffusers' `from_pretrained` loads it: the weights in fp32, then config.json.

    Args:
        path: a local folder, which is made.
        spec: what the network is.
        state: its state dict.

    Raises:
        ConfigError: diffusers has no such network, or the state dict is another network's.
    """
    config, tensors = to_diffusers(spec, state)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
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
        # First, as diffusers does: it leaves the whole file of earlier weights beside them.
        for index in (f"{_WEIGHTS}.safetensors.index{variant}.json", f"{_WEIGHTS}{variant}.safetensors.index.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
        whole = folder / f"{_WEIGHTS}{variant}.safetensors"
        if whole.is_file():
            return [whole]
    if list(folder.glob("*.bin")) or list(folder.glob("*.ckpt")):
        raise ConfigError(
            f"{folder}: the weights are pickles (.bin or .ckpt), which can run any code where they are read; convert "
            f"them to {_WEIGHTS}.safetensors"
        )
    others = [file.name for file in sorted(folder.iterdir()) if file.name != _CONFIG]
    there = ", ".join(others[:_MOST_NAMED]) + (", ..." if len(others) > _MOST_NAMED else "")
    raise ConfigError(
        f"{folder}: no {_WEIGHTS}.safetensors, and no index of its shards; beside {_CONFIG} is {there or 'nothing'}"
    )


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{index}: no weight_map of tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ConfigError(f"{index}: '{name}' is not a file beside it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's keys and values; ConfigError if it is missing, damaged, or anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: no such file; give a folder of diffusers' weights") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return values


def _check_shapes(where: str | Path, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """ConfigError that names what is missing, what is not known, and what has another shape."""
    if problems := shape_problems(found, wanted):
        raise ConfigError(f"{where}: tensors do not fit the config: {'; '.join(problems)}")
