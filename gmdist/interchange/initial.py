"""A network's first weights from a folder of diffusers, compared with the network that they are for."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig
from gmdist.errors import ConfigError
from gmdist.interchange.configs import config_json, latent_scale
from gmdist.interchange.diffusers import read_folder, read_json
from gmdist.interchange.names import is_class_table
from gmdist.interchange.pipelines import DIT_CLASSES, INDEX
from gmdist.interchange.schedulers import PREDICTIONS, schedule_of
from gmdist.interchange.spec import NetworkSpec
from gmdist.interchange.values import AUTOENCODER, DIT, PLAIN_UNET, UNET, Values
from gmdist.nets.dit import DiTConfig

_Found = TypeVar("_Found")
_SAME_ALPHA = 1e-3  # of the data, by which timesteps of one schedule may differ: configs round their betas
# Keys of config.json whose values a run may choose anew: its weights fit.
_FREE = {
    UNET: {"sample_size", "dropout"},
    PLAIN_UNET: {"sample_size", "dropout"},
    AUTOENCODER: {"sample_size", "scaling_factor", "shift_factor"},
    DIT: set[str](),
}
# What they are called in a run's config; a DiT's norm_eps below.
_OURS = {
    "block_out_channels": "channels and multipliers",
    "layers_per_block": "num_res_blocks",
    "norm_num_groups": "norm_groups",
    "attention_head_dim": "num_heads or head_channels",
    "cross_attention_dim": "the captions' encoder",
    "num_class_embeds": "data.num_classes + 1",
    "num_embeds_ada_norm": "data.num_classes",
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "transformer_layers_per_block": "transformer_depths",
    "use_linear_projection": "linear_projections",
    "use_quant_conv": "quant_convs",
    "freq_shift": "frequency_shift",
    "flip_sin_to_cos": "not sines_first",
    "downsample_padding": "not asymmetric_downsampling",
}


def initial_problem(path: str | None) -> str | None:
    """Why first weights cannot be read from there, as "key: value; what is valid"; None if they may be."""
    if path is not None and "://" in path:
        return f"init_from: '{path}'; must be a local folder, on every worker's machine"
    return None


def initial_state(path: str, name: str, spec: NetworkSpec) -> dict[str, Tensor]:
    """The state dict of a network from a folder of diffusers, in fp32.

    Args:
        path: the folder of the network, or of a pipeline.
        name: the network's folder in a pipeline.
        spec: of the network that it is for.

    Raises:
        ConfigError: there is none, it is another network, or its tensors are not what its config says.
    """
    return _state_of(path, name, spec, lambda ours: True)


def check_initial(path: str, name: str, spec: NetworkSpec) -> None:
    """Raise what `initial_state` would, but for values that are not finite: only the tables of classes are read."""
    _state_of(path, name, spec, is_class_table)


def _state_of(path: str, name: str, spec: NetworkSpec, is_read: Callable[[str], bool]) -> dict[str, Tensor]:
    folder = _network_folder(path, name)
    there, state = _naming(lambda: read_folder(folder, _has_block_embeddings(spec), is_read))
    if isinstance(there.config, DiTConfig) and there.num_classes == DIT_CLASSES:  # as many as `dit_pipeline` fills up
        tables = {ours: table for ours, table in state.items() if is_class_table(ours)}
        num_classes = DIT_CLASSES - min(_num_filling(table) for table in tables.values())
        num_classes = num_classes or min(spec.num_classes, DIT_CLASSES)  # all rows are equal, and do not tell
        there = replace(there, num_classes=num_classes)
        state |= {ours: table[: num_classes + 1].clone() for ours, table in tables.items()}
    _compare(folder, there, spec)
    return state


def process_doubt(path: str, diffusion: DiffusionConfig) -> str | None:
    """How a pipeline's process differs from that of a run that begins with its network, in words; None if not.

    It may be meant: the network learns the other process anew.
    """
    pipeline = _pipeline_of(path)
    file = None if pipeline is None else pipeline / "scheduler" / "scheduler_config.json"
    if file is None or not file.is_file():
        return None
    try:
        theirs = read_json(file)
    except ConfigError as error:
        return f"init_from: {error}"
    kind = str(theirs.get("_class_name"))
    is_discrete = not any(word in kind for word in ("FlowMatch", "EDM"))
    if is_discrete != diffusion.is_discrete:
        return f"init_from: {path}; its scheduler is a {kind}, and diffusion.schedule is '{diffusion.schedule}' here"
    if not is_discrete:
        return None
    found = {
        "prediction": (PREDICTIONS[diffusion.prediction], theirs.get("prediction_type", PREDICTIONS["eps"])),
        "num_timesteps": (diffusion.num_timesteps, theirs.get("num_train_timesteps", 1000)),
        "zero_terminal_snr": (diffusion.zero_terminal_snr, theirs.get("rescale_betas_zero_snr", False)),
    }
    differences = [
        f"diffusion.{key} is {getattr(diffusion, key)} here, and its scheduler's is {other}"
        for key, (own, other) in found.items()
        if own != other
    ]
    if found["num_timesteps"][0] == found["num_timesteps"][1]:
        differences += _schedule_differences(theirs, diffusion)
    return f"init_from: {path}; {'; '.join(differences)}" if differences else None


def _schedule_differences(theirs: Mapping[str, Any], diffusion: DiffusionConfig) -> list[str]:
    """How much more or less noise timesteps have than a scheduler's, in words; none if they have the same."""
    try:
        abar = schedule_of(theirs)
    except ConfigError as error:
        return [str(error)]
    own = replace(diffusion, zero_terminal_snr=False).abar()
    if len(own) != len(abar):  # of betas that it lists
        return [f"its scheduler has {len(abar)} betas, and there are {len(own)} timesteps here"]
    apart = (own.sqrt() - abar.sqrt()).abs()
    most = int(apart.argmax())
    if apart[most] < _SAME_ALPHA:
        return []
    return [
        f"diffusion.schedule '{diffusion.schedule}' leaves {float(own[most].sqrt()):.3f} of the data at timestep {most}"
        f" here, and its scheduler's {theirs.get('beta_schedule', 'linear')!r} {float(abar[most].sqrt()):.3f}"
    ]


def latent_scale_of(path: str) -> float | None:
    """What a pipeline multiplies its VAE's latents by for the network that is begun with; None where nothing says it.

    ConfigError for what is no number above 0.
    """
    pipeline = _pipeline_of(path)
    file = None if pipeline is None else pipeline / "vae" / "config.json"
    if file is None or not file.is_file():
        return None
    try:
        return latent_scale(Values(AUTOENCODER, read_json(file)))
    except ConfigError as error:
        raise ConfigError(f"family.init_from: {file}: {error}") from error


def _pipeline_of(path: str) -> Path | None:
    """The pipeline that a folder is, or that its folder of one network belongs to; None for a network alone."""
    folder = Path(os.path.abspath(path))  # a link in a pipeline belongs to it
    return next((one for one in (folder, folder.parent) if (one / INDEX).is_file()), None)


def _num_filling(table: Tensor) -> int:
    """By how many rows like its last `dit_pipeline` made a table [K + 1, C] of classes and "no class" longer."""
    same = (table == table[-1]).all(dim=1).flip(0).long()
    return int(same.cumprod(0).sum()) - 1


def _has_block_embeddings(spec: NetworkSpec) -> bool:
    return isinstance(spec.config, DiTConfig) and spec.config.block_embeddings


def _naming(read: Callable[[], _Found]) -> _Found:
    """What is read; errors name the key of the run's config."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"family.init_from: {error}") from error


def _network_folder(path: str, name: str) -> Path:
    folder = Path(path)
    if (folder / INDEX).is_file():
        if not (folder / name).is_dir():
            raise ConfigError(f"family.init_from: {path}; a pipeline without the '{name}' that this run has")
        return folder / name
    return folder


def _compare(folder: Path, there: NetworkSpec, here: NetworkSpec) -> None:
    """ConfigError that names every difference of two networks."""
    try:
        ours = config_json(here)
    except ConfigError as error:
        raise ConfigError(
            f"family.init_from: {folder}; this run's network is none that diffusers has: {error}"
        ) from error
    try:
        theirs = config_json(there)
    except ConfigError as error:
        raise ConfigError(f"family.init_from: {folder}; holds a network that no run has: {error}") from error
    kind = ours["_class_name"]
    if theirs["_class_name"] != kind:
        raise ConfigError(f"family.init_from: {folder}; holds a {theirs['_class_name']}, and this run has a {kind}")
    named = _OURS | ({"norm_eps": "feed_forward_norm_eps"} if kind == DIT else {})
    differences = [
        f"{key}{f' ({named[key]})' if key in named else ''} {theirs[key]} there, {ours[key]} here"
        for key in sorted(ours.keys() - _FREE[kind])
        if ours[key] != theirs[key]
    ]
    if _has_block_embeddings(there) and not _has_block_embeddings(here):
        differences.append("block_embeddings true there, false here")
    if differences:
        raise ConfigError(f"family.init_from: {folder}; holds another network: {'; '.join(differences)}")
