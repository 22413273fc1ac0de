"""The config.json of diffusers' networks, from and to our specs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from gmdist.errors import ConfigError
from gmdist.interchange.spec import NetworkSpec
from gmdist.interchange.unets import read_plain_unet, read_unet, write_plain_unet, write_unet
from gmdist.interchange.values import AUTOENCODER, DIT, FIXED, MOST_LAYERS, PLAIN_UNET, UNET, Values, check_blocks
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig

# What our settings are called there.
_THEIRS = {
    "channels": "block_out_channels",
    "multipliers": "block_out_channels",
    "norm_groups": "norm_num_groups",
    "num_heads": "attention_head_dim",
    "head_channels": "attention_head_dim",
    "frequency_shift": "freq_shift",
}
_THEIRS_OF_DIT = {"channels": "num_attention_heads x attention_head_dim", "feed_forward_norm_eps": "norm_eps"}
_SCALED_SIZE = 128  # from which on a Transformer2DModel scales its positions


def spec_of(values: Mapping[str, Any]) -> NetworkSpec:
    """The spec of the network that a config.json of diffusers describes.

    Raises:
        ConfigError: it is not one of the networks that we have, or has a setting that ours does not.
    """
    kind = str(values.get("_class_name"))
    if kind == "Transformer2DModel":
        if (norm_type := values.get("norm_type")) != FIXED[DIT]["norm_type"]:
            raise ConfigError(f"norm_type: {norm_type!r}; gmdist has {kind} with '{FIXED[DIT]['norm_type']}' alone")
        kind = DIT  # its name before diffusers 0.29
        size = values.get("sample_size")
        if isinstance(size, int) and size >= _SCALED_SIZE:
            raise ConfigError(
                f"sample_size: {size}; from {_SCALED_SIZE} on a Transformer2DModel scales its positions, which gmdist "
                "does not"
            )
    if kind not in _READERS:
        raise ConfigError(f"_class_name: '{kind}'; must be one of {', '.join(_READERS)}")
    asked = Values(kind, values)
    spec = _READERS[kind](asked)
    asked.finish()
    if problem := spec.config.problem():
        key = (_THEIRS_OF_DIT if kind == DIT else _THEIRS).get(problem.partition(":")[0])
        raise ConfigError(f"a network that cannot be: {problem}" + (f" ({key} in config.json)" if key else ""))
    return spec


def config_json(spec: NetworkSpec) -> dict[str, Any]:
    """The config.json that lets diffusers build a network.

    Raises:
        ConfigError: diffusers has no such network; says why.
    """
    if isinstance(spec.config, DiTConfig):
        kind, written = DIT, _write_dit(spec, spec.config)
    elif isinstance(spec.config, AutoencoderConfig):
        kind, written = AUTOENCODER, _write_autoencoder(spec, spec.config)
    elif spec.config.context_channels is None:
        kind, written = PLAIN_UNET, write_plain_unet(spec, spec.config)
    else:
        kind, written = UNET, write_unet(spec, spec.config)
    return {"_class_name": kind} | FIXED[kind] | written


def _read_autoencoder(values: Values) -> NetworkSpec:
    widths = values.numbers("block_out_channels", [])
    check_blocks("down_block_types", values.texts("down_block_types"), ["DownEncoderBlock2D"] * len(widths))
    check_blocks("up_block_types", values.texts("up_block_types"), ["UpDecoderBlock2D"] * len(widths))
    channels, out_channels = values.number("in_channels", 3), values.number("out_channels", 3)
    if channels != out_channels:
        raise ConfigError(f"out_channels: {out_channels}; must be in_channels, {channels}")
    quant = values.flag("use_quant_conv", True)
    if quant != values.flag("use_post_quant_conv", True):
        raise ConfigError(f"use_post_quant_conv: {not quant}; must be as use_quant_conv")
    width = math.gcd(*widths)
    config = AutoencoderConfig(
        channels=width,
        multipliers=tuple(w // width for w in widths),
        num_res_blocks=values.number("layers_per_block", 1, most=MOST_LAYERS),
        latent_channels=values.number("latent_channels", 4),
        quant_convs=quant,
        norm_groups=values.number("norm_num_groups", 32),
    )
    return NetworkSpec(
        config,
        channels,
        size=values.size(),
        latent_scale=latent_scale(values),
        latent_shift=values.number("shift_factor", None, float),
    )


def latent_scale(values: Values) -> float:
    """What a VAE's latents are multiplied by, to have unit variance."""
    scale: float = values.number("scaling_factor", 0.18215, float)
    if scale <= 0.0:
        raise ConfigError(f"scaling_factor: {scale}; must be above 0")
    return scale


def _write_autoencoder(spec: NetworkSpec, config: AutoencoderConfig) -> dict[str, Any]:
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.in_channels,
        "sample_size": spec.size or 32,  # where diffusers may begin to decode in tiles; its own default
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": spec.norm_groups(),
        "scaling_factor": 1.0 if spec.latent_scale is None else spec.latent_scale,
        "shift_factor": spec.latent_shift,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
    }


def _read_dit(values: Values) -> NetworkSpec:
    heads, head_width = values.number("num_attention_heads", 16), values.number("attention_head_dim", 72)
    channels = values.number("in_channels", 4)
    out_channels = values.number("out_channels", None) or channels
    if out_channels not in (channels, 2 * channels):
        raise ConfigError(
            f"out_channels: {out_channels}; must be {channels}, or {2 * channels} with a learned variance"
        )
    config = DiTConfig(
        channels=heads * head_width,
        depth=values.number("num_layers", 28, most=MOST_LAYERS),
        num_heads=heads,
        patch_size=values.number("patch_size", 2),
        learned_sigma=out_channels != channels,
        frequency_shift=1,
        feed_forward_norm_eps=float(values.number("norm_eps", 1e-5, float)),
    )
    size = values.number("sample_size", 32)
    if size % config.patch_size:
        raise ConfigError(f"sample_size: {size}; must be a multiple of the patch, {config.patch_size}")
    return NetworkSpec(config, channels, num_classes=values.number("num_embeds_ada_norm", 1000), size=size)


def _write_dit(spec: NetworkSpec, config: DiTConfig) -> dict[str, Any]:
    if config.qk_norm:
        raise ConfigError(f"qk_norm: true; diffusers' {DIT} does not normalise queries and keys")
    if config.frequency_shift != 1:
        raise ConfigError(f"frequency_shift: {config.frequency_shift}; diffusers' {DIT} has 1")
    if spec.num_classes == 0:
        raise ConfigError(f"num_classes: 0; diffusers' {DIT} always has a class embedding")
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.channels // config.num_heads,
        "in_channels": spec.in_channels,
        "out_channels": spec.in_channels * (2 if config.learned_sigma else 1),
        "num_layers": config.depth,
        "sample_size": spec.size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": spec.num_classes,
        "norm_eps": config.feed_forward_norm_eps,
    }


_READERS: dict[str, Callable[[Values], NetworkSpec]] = {
    UNET: read_unet,
    PLAIN_UNET: read_plain_unet,
    AUTOENCODER: _read_autoencoder,
    DIT: _read_dit,
}
