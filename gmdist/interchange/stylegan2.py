"""StyleGAN2's first weights from safetensors under its authors' names (github.com/NVlabs/stylegan2-ada-pytorch)."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.interchange.tensors import check_dtypes, open_file, read_tensor, shape_problems
from gmdist.nets.stylegan2_discriminator import LAST_SIDE, StyleGAN2Discriminator
from gmdist.nets.stylegan2_generator import StyleGAN2Generator

GENERATOR, DISCRIMINATOR = "generator.safetensors", "discriminator.safetensors"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
_BLOCK = {"conv1": "conv0", "conv2": "conv1", "skip": "skip"}  # its layers here and there
_FILTERED = ("conv0", "conv1", "conv", "skip", "fromrgb")  # layers there with a low pass, most of them without use
_FILTER = "resample_filter"


def initial_problem(path: str | None) -> str | None:
    """Why first weights cannot be read from there, as "key: value; what is valid"; None if they may be."""
    if path is None:
        return None
    if "://" in path:
        return f"init_from: '{path}'; must be a local file or folder, on every worker's machine"
    if path.endswith(_PICKLES):
        return f"init_from: '{path}'; {_no_pickle()}"
    return None


def initial_states(
    path: str, generator: StyleGAN2Generator, discriminator: StyleGAN2Discriminator
) -> dict[str, dict[str, Tensor]]:
    """State dicts in fp32 for `generator` and, from a folder, `discriminator`.

    Args:
        path: a folder with generator.safetensors and discriminator.safetensors, or a generator's file alone.
        generator, discriminator: that they are for, or their outlines.

    Raises:
        ConfigError: no such file, another network, a tensor that is missing, not known, of another shape, or not
            finite, or another low pass than ours.
    """
    place = Path(path)
    if place.is_file():
        return {"generator": _read_network(place, generator)}
    if not place.is_dir():
        raise ConfigError(f"family.init_from: {path}; there is no such file or folder")
    has_generator = (place / GENERATOR).is_file()
    if not has_generator or not (place / DISCRIMINATOR).is_file():
        reason = f"there is no {DISCRIMINATOR if has_generator else GENERATOR}"
        if has_generator:
            reason += f"; to begin with a fresh discriminator, name {place / GENERATOR} itself"
        elif any(file.suffix in _PICKLES for file in place.iterdir()):
            reason += f"; {_no_pickle()}"
        raise ConfigError(f"family.init_from: {path}; {reason}")
    return {
        "generator": _read_network(place / GENERATOR, generator),
        "discriminator": _read_network(place / DISCRIMINATOR, discriminator),
    }


def their_names(network: StyleGAN2Generator | StyleGAN2Discriminator) -> dict[str, str]:
    """The name there of every parameter and buffer of ours."""
    if isinstance(network, StyleGAN2Generator):
        sides, shown = network.synthesis.sides[1:], network.synthesis.sides[-len(network.synthesis.pixels) :]
        block, pixels = "synthesis.", "torgb"
        starts = {
            "mean_style": "mapping.w_avg",
            "synthesis.constant": "synthesis.b4.const",
            "synthesis.conv.": "synthesis.b4.conv1.",
        }
    else:
        sides = _block_sides(network)
        shown, block, pixels = [*sides, LAST_SIDE], "", "fromrgb"
        starts = {"conv.": "b4.conv.", "hidden.": "b4.fc.", "out.": "b4.out."}
    for i, side in enumerate(sides):
        starts |= {f"{block}blocks.{i}.{ours}.": f"{block}b{side}.{theirs}." for ours, theirs in _BLOCK.items()}
    starts |= {f"{block}pixels.{i}.": f"{block}b{side}.{pixels}." for i, side in enumerate(shown)}
    if network.mapping is not None:
        starts |= {f"mapping.layers.{i}.": f"mapping.fc{i}." for i in range(len(network.mapping.layers))}
        starts["mapping.embedding."] = "mapping.embed."
    names = {}
    for name in network.state_dict():
        ours = next(start for start in starts if name.startswith(start))
        names[name] = re.sub(r"\.noise$", ".noise_const", starts[ours] + name.removeprefix(ours))
    return names


def shapes_there(network: StyleGAN2Generator | StyleGAN2Discriminator) -> dict[str, list[int]]:
    """The shape of every tensor that there is of such a network, by its name there."""
    state = network.state_dict()
    shapes = {theirs: list(state[ours].shape) for ours, theirs in their_names(network).items()}
    shapes |= {name: [] for name in shapes if name.endswith(".noise_strength")}  # scalars there
    owners = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    filtered = [owner for owner in owners if owner.rpartition(".")[2] in _FILTERED]
    if isinstance(network, StyleGAN2Generator):
        filtered += [f"synthesis.b{side}" for side in network.synthesis.sides]
    else:
        filtered += [f"b{side}" for side in _block_sides(network)]
    return shapes | {f"{owner}.{_FILTER}": [4, 4] for owner in filtered}


def _read_network(file: Path, network: StyleGAN2Generator | StyleGAN2Discriminator) -> dict[str, Tensor]:
    is_generator = isinstance(network, StyleGAN2Generator)
    child, describe = ("generator", _generator_settings) if is_generator else ("discriminator", _discriminator_settings)
    try:
        with ExitStack() as stack:
            opened = open_file(file, stack)
            names = list(opened.keys())
            slices = {name: opened.get_slice(name) for name in names}
            found, wanted = {name: part.get_shape() for name, part in slices.items()}, shapes_there(network)
            if problems := shape_problems(found, wanted):
                problems = _differences(describe(found), describe(wanted)) + problems
                raise ConfigError(f"{file}; is not this run's {child}: {'; '.join(problems)}")
            check_dtypes({name: part.get_dtype() for name, part in slices.items()}, file)
            tensors = {name: read_tensor(opened, name, file) for name in wanted}
    except ConfigError as error:
        raise ConfigError(f"family.init_from: {error}") from error
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
    low_passes = sorted(name for name in tensors if name.endswith(_FILTER))
    if others := [name for name in low_passes if not torch.equal(tensors[name], torch.outer(taps, taps))]:
        raise ConfigError(f"family.init_from: {file}; must have the low pass of [1, 3, 3, 1] in {', '.join(others)}")
    state = network.state_dict()
    return {ours: tensors[theirs].reshape(state[ours].shape) for ours, theirs in their_names(network).items()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{key} {there[key]} there, {value} here" for key, value in here.items() if there.get(key) not in (None, value)
    ]


def _block_sides(network: StyleGAN2Discriminator) -> list[int]:
    """Of what each block takes in."""
    return [LAST_SIDE << i for i in range(len(network.blocks), 0, -1)]


def _generator_settings(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """What the tensors of a generator say of a run's config, by its keys; None: nothing."""
    widths = _lengths(shapes, r"synthesis\.b(\d+)\.conv1\.weight", 0)
    num_classes = _length(shapes, "mapping.embed.weight", 1) or 0
    style = _length(shapes, "synthesis.b4.conv1.affine.weight", 1)
    taken_in = _length(shapes, "mapping.fc0.weight", 1)
    return {
        **_common_settings(shapes, "generator", widths, "synthesis.b4.torgb.weight"),
        "data.channels": _length(shapes, f"synthesis.b{max(widths, default=0)}.torgb.weight", 0),
        "family.generator.latent_channels": taken_in and style and taken_in - style * bool(num_classes),
        "family.generator.style_channels": style,
    }


def _discriminator_settings(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The settings that the shapes of a discriminator tell of."""
    widths = _lengths(shapes, r"b(\d+)\.conv0\.weight", 0) | _lengths(shapes, r"b(4)\.conv\.weight", 0)
    taken_in = _length(shapes, "b4.conv.weight", 1)
    return {
        **_common_settings(shapes, "discriminator", widths, "b4.fromrgb.weight"),
        "data.channels": _length(shapes, f"b{max(widths, default=0)}.fromrgb.weight", 1),
        "family.discriminator.minibatch_std_group": taken_in and ("0" if taken_in == widths.get(4) else "above 0"),
    }


def _common_settings(
    shapes: Mapping[str, list[int]], child: str, widths: dict[int, int], small_image: str
) -> dict[str, Any]:
    """The settings that both networks have; none without features, whose `widths` are by their sides."""
    if not widths:
        return {}
    is_resnet = any(".skip." in name for name in shapes)
    low_passes = {shape[0] for name, shape in shapes.items() if name.endswith(_FILTER) and shape}
    return {
        "data.image_size": max(widths),
        "data.num_classes (or family.conditional)": _length(shapes, "mapping.embed.weight", 1) or 0,
        f"family.{child}.architecture": "skip" if small_image in shapes else "resnet" if is_resnet else "orig",
        f"family.{child}.mapping_layers": len(_lengths(shapes, r"mapping\.fc(\d+)\.weight", 0)),
        "lengths of low passes": sorted(low_passes),
        **{
            f"family.{child}.channel_base or channel_max, by the width at side {side},": widths[side] for side in widths
        },
    }


def _lengths(shapes: Mapping[str, list[int]], pattern: str, axis: int) -> dict[int, int]:
    """Of tensors that a pattern numbers, along an axis."""
    matches = ((re.fullmatch(pattern, name), shape) for name, shape in shapes.items())
    return {int(match[1]): shape[axis] for match, shape in matches if match and axis < len(shape)}


def _length(shapes: Mapping[str, list[int]], name: str, axis: int) -> int | None:
    """Of a tensor along an axis; None where there is none."""
    shape = shapes.get(name, [])
    return shape[axis] if axis < len(shape) else None


def _no_pickle() -> str:
    return (
        "a pickle can run any code where it is read, and is not read here: where its source is trusted, write "
        f"G_ema.state_dict() to {GENERATOR} and D.state_dict() to {DISCRIMINATOR} with safetensors.torch.save_file, in "
        "the folder of its authors' code (docs/training.md has the lines)"
    )
