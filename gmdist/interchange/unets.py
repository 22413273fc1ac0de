"""The config.json of diffusers' UNets, from and to our specs."""

from typing import Any

from gmdist.errors import ConfigError
from gmdist.interchange.spec import NetworkSpec
from gmdist.interchange.values import MOST_LAYERS, PLAIN_UNET, UNET, Values, check_blocks
from gmdist.nets.unet import SIZE_CHANNELS, UNetConfig


def read_unet(values: Values) -> NetworkSpec:
    """A UNet with transformers: Stable Diffusion's."""
    common, widths = _read_levels(values, "CrossAttn")
    heads = values.numbers("attention_head_dim", [8] * len(widths), len(widths))  # a count, in spite of its name
    attended = sorted({*common["attention_levels"], len(widths) - 1})
    head_widths = {widths[level] / heads[level] for level in attended}
    if len({heads[level] for level in attended}) == 1:
        common["num_heads"] = heads[attended[0]]
    elif len(head_widths) == 1 and (head_width := head_widths.pop()).is_integer():
        common["head_channels"] = int(head_width)
    else:
        raise ConfigError(f"attention_head_dim: {heads}; all levels must have equal numbers or equal widths of heads")
    depths = values.numbers("transformer_layers_per_block", [1] * len(widths), len(widths), most=MOST_LAYERS)
    contexts = values.numbers("cross_attention_dim", [1280] * len(widths), len(widths))
    if len(set(contexts)) > 1:
        raise ConfigError(f"cross_attention_dim: {contexts}; gmdist's UNet has one context for all levels")
    addition = values.raw("addition_embed_type", None)
    size_channels = values.number("addition_time_embed_dim", None)
    vector = values.number("projection_class_embeddings_input_dim", None)
    if addition not in (None, "text_time") or (addition and (size_channels != SIZE_CHANNELS or vector is None)):
        raise ConfigError(
            f"addition_embed_type: {addition!r} with addition_time_embed_dim {size_channels} and "
            f"projection_class_embeddings_input_dim {vector}; must be null, or 'text_time' with {SIZE_CHANNELS} and "
            "a width"
        )
    if addition:
        _check_sizes(common["frequency_shift"], common["sines_first"])
    config = UNetConfig(
        **common,
        context_channels=contexts[0],
        transformer_depths=() if set(depths) == {1} else tuple(depths),
        linear_projections=values.flag("use_linear_projection", False),
        vector_channels=vector if addition else None,
    )
    return _unet_spec(values, config, default_channels=4)


def _check_sizes(frequency_shift: int, sines_first: bool) -> None:
    """ConfigError unless six sizes are embedded as ours are: diffusers embeds them as it does timesteps."""
    if frequency_shift or sines_first:
        raise ConfigError(
            f"freq_shift: {frequency_shift}, flip_sin_to_cos: {not sines_first}; must be 0 and true with a vector of "
            "sizes"
        )


def read_plain_unet(values: Values) -> NetworkSpec:
    """A UNet with self-attention alone: DDPM's."""
    common, _ = _read_levels(values, "Attn")
    # A width here; None: one head.
    head_width = values.number("attention_head_dim", None) if "attention_head_dim" in values.values else 8
    config = UNetConfig(**common, num_heads=1, head_channels=head_width)
    return _unet_spec(values, config, default_channels=3)


def _read_levels(values: Values, attention: str) -> tuple[dict[str, Any], list[int]]:
    """What both kinds of UNet have: fields of a UNetConfig, and the width of each level."""
    widths = values.numbers("block_out_channels", [])
    down, levels = values.texts("down_block_types"), range(len(widths))
    with_attention = tuple(level for level in levels if down[level : level + 1] == [f"{attention}DownBlock2D"])
    check_blocks("down_block_types", down, _block_types("DownBlock2D", attention, levels, with_attention))
    up = values.texts("up_block_types")
    check_blocks("up_block_types", up, _block_types("UpBlock2D", attention, levels, with_attention)[::-1])
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"block_out_channels: {widths}; all must be multiples of the first")
    shift, padding = values.number("freq_shift", 0, least=0), values.number("downsample_padding", 1, least=0)
    if padding > 1:
        raise ConfigError(f"downsample_padding: {padding}; must be 1, or 0 for right and below only")
    if shift > 1:
        raise ConfigError(f"freq_shift: {shift}; must be 0 or 1")
    fields = {
        "channels": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": values.number("layers_per_block", 2, most=MOST_LAYERS),
        "attention_levels": with_attention,
        "dropout": float(values.number("dropout", 0.0, float)),
        "norm_groups": values.number("norm_num_groups", 32),
        "norm_eps": float(values.number("norm_eps", 1e-5, float)),
        "frequency_shift": shift,
        "sines_first": not values.flag("flip_sin_to_cos", True),
        "asymmetric_downsampling": padding == 0,
    }
    return fields, widths


def _block_types(name: str, attention: str, levels: range, with_attention: tuple[int, ...]) -> list[str]:
    return [f"{attention if level in with_attention else ''}{name}" for level in levels]


def _unet_spec(values: Values, config: UNetConfig, default_channels: int) -> NetworkSpec:
    channels = values.number("in_channels", default_channels)
    out_channels = values.number("out_channels", default_channels)
    embeddings = values.number("num_class_embeds", None, least=2)  # with one for "no class", as ours
    return NetworkSpec(
        config,
        channels,
        num_classes=embeddings - 1 if embeddings else 0,
        out_channels=None if out_channels == channels else out_channels,
        size=values.size(),
    )


def write_unet(spec: NetworkSpec, config: UNetConfig) -> dict[str, Any]:
    """What `read_unet` reads; ConfigError for what diffusers does not have."""
    written = _write_levels(spec, config, "CrossAttn")
    vector = config.vector_channels
    if vector is not None and vector <= 6 * SIZE_CHANNELS:
        raise ConfigError(
            f"vector_channels: {vector}; diffusers' {UNET} takes a pooled text and six sizes of {SIZE_CHANNELS}"
        )
    if vector is not None:
        _check_sizes(config.frequency_shift, config.sines_first)
    widths = written["block_out_channels"]
    heads = [max(config.heads(width), 1) for width in widths]
    attended = {heads[level] for level in {*config.attention_levels, len(widths) - 1}}
    depths = [config.depth(level) for level in range(len(widths))]
    return written | {
        "cross_attention_dim": config.context_channels,
        "attention_head_dim": attended.pop() if len(attended) == 1 else heads,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "use_linear_projection": config.linear_projections,
        "addition_embed_type": "text_time" if vector else None,
        "addition_time_embed_dim": SIZE_CHANNELS if vector else None,
        "projection_class_embeddings_input_dim": vector,
    }


def write_plain_unet(spec: NetworkSpec, config: UNetConfig) -> dict[str, Any]:
    """What `read_plain_unet` reads; ConfigError for what diffusers does not have."""
    if config.vector_channels is not None:
        raise ConfigError(
            f"vector_channels: {config.vector_channels}; diffusers' {PLAIN_UNET}, without context, has none"
        )
    levels = {*config.attention_levels, len(config.multipliers) - 1}
    widths = {config.channels * config.multipliers[level] for level in levels}
    head_widths = {width // config.heads(width) for width in widths}
    one_head = all(config.heads(width) == 1 for width in widths)
    if len(head_widths) > 1 and not one_head:
        raise ConfigError(
            f"num_heads: {config.num_heads}; the heads of diffusers' {PLAIN_UNET} have one width at all levels: set "
            "head_channels"
        )
    return _write_levels(spec, config, "Attn") | {"attention_head_dim": None if one_head else head_widths.pop()}


def _write_levels(spec: NetworkSpec, config: UNetConfig, attention: str) -> dict[str, Any]:
    if config.multipliers[0] != 1:
        raise ConfigError(
            f"multipliers: {list(config.multipliers)}; diffusers' UNets begin at the width of the first level: the "
            "first must be 1"
        )
    levels = range(len(config.multipliers))
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels or spec.in_channels,
        "sample_size": spec.size,
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": _block_types("DownBlock2D", attention, levels, config.attention_levels),
        "up_block_types": _block_types("UpBlock2D", attention, levels, config.attention_levels)[::-1],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": spec.norm_groups(),
        "norm_eps": config.norm_eps,
        "freq_shift": config.frequency_shift,
        "flip_sin_to_cos": not config.sines_first,
        "downsample_padding": 0 if config.asymmetric_downsampling else 1,
        "num_class_embeds": spec.num_classes + 1 if spec.num_classes else None,
    }
