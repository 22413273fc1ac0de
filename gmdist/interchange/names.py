"""Where diffusers keeps each tensor of our networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.blocks import ResBlock, SelfAttention2d
from gmdist.nets.dit import DiTBlock, DiTConfig
from gmdist.nets.transformer import (
    Attention,
    FeedForward,
    GatedFeedForward,
    SelfAttention,
    Transformer2d,
    TransformerBlock,
)
from gmdist.nets.unet import UNetConfig

# The parts of a module that have another name there; a fused projection is three.
_QKV = ("to_q", "to_k", "to_v")
_PARTS: dict[type[nn.Module], dict[str, str | tuple[str, ...]]] = {
    ResBlock: {"embedding": "time_emb_proj", "skip": "conv_shortcut"},
    SelfAttention2d: {"norm": "group_norm", "qkv": _QKV, "out": "to_out.0"},
    SelfAttention: {"qkv": _QKV, "out": "to_out.0"},
    Attention: {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"},
    FeedForward: {"up": "net.0.proj", "down": "net.2"},
    GatedFeedForward: {"up": "net.0.proj", "down": "net.2"},
    TransformerBlock: {"self_attention": "attn1", "cross_attention": "attn2", "feed_forward": "ff"},
    Transformer2d: {"project_in": "proj_in", "project_out": "proj_out", "blocks": "transformer_blocks"},
    DiTBlock: {"modulation": "norm1.linear", "attention": "attn1", "feed_forward": "ff"},
}
# Of plain self-attention written before diffusers 0.14.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# Tensors of ours that belong to a loss: an autoencoder's, of its reconstruction.
OF_LOSSES = {"logvar"}


@dataclass(frozen=True)
class Link:
    """One tensor of ours and its place in diffusers: one tensor, several joined along the first axis, or copies."""

    ours: str
    theirs: tuple[str, ...]
    are_copies: bool = False


def links(spec: NetworkSpec, outline: nn.Module) -> list[Link]:
    """The place of every tensor of a network; `outline` is the network, or its outline."""
    if isinstance(spec.config, UNetConfig):
        places = _unet_places(spec.config)
    elif isinstance(spec.config, DiTConfig):
        places = _dit_places(spec.config)
    else:
        places = _autoencoder_places(spec.config)

    found: list[Link] = []
    theirs_of: dict[str, tuple[str, ...]] = {"": ("",)}
    for path, module in outline.named_modules():
        if path in places:
            theirs_of[path] = places[path]
        elif path:
            parent, _, name = path.rpartition(".")
            names = _PARTS.get(type(outline.get_submodule(parent)), {}).get(name, name)
            (place,) = theirs_of[parent]  # nothing lies below a fused projection
            theirs_of[path] = tuple(f"{place}.{n}".lstrip(".") for n in ((names,) if isinstance(names, str) else names))
        for name, _ in module.named_parameters(recurse=False):
            theirs = tuple(f"{place}.{name}" for place in theirs_of[path])
            found.append(Link(f"{path}.{name}", theirs, are_copies=path in places and len(theirs) > 1))
    return found


def _unet_places(config: UNetConfig) -> dict[str, tuple[str, ...]]:
    places = {
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "label": "class_embedding",
        "vector.0": "add_embedding.linear_1",
        "vector.2": "add_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "middle.0.residual": "mid_block.resnets.0",
        "middle.0.attention": "mid_block.attentions.0",
        "middle.1.residual": "mid_block.resnets.1",
    }
    num_levels = len(config.multipliers)
    for ours, block, num_stages, resampler in (
        ("down", "down_blocks", config.num_res_blocks, "downsamplers"),
        ("up", "up_blocks", config.num_res_blocks + 1, "upsamplers"),
    ):
        for level in range(num_levels):
            first = level * (num_stages + 1)  # every level ends in a resampling, but for the last
            for i in range(num_stages):
                places[f"{ours}.{first + i}.residual"] = f"{block}.{level}.resnets.{i}"
                places[f"{ours}.{first + i}.attention"] = f"{block}.{level}.attentions.{i}"
            if level < num_levels - 1:
                places[f"{ours}.{first + num_stages}"] = f"{block}.{level}.{resampler}.0"
    return {ours: (theirs,) for ours, theirs in places.items()}


def _autoencoder_places(config: AutoencoderConfig) -> dict[str, tuple[str, ...]]:
    places = {"encoder.quant": "quant_conv", "decoder.quant": "post_quant_conv"}
    num_levels = len(config.multipliers)
    for side, block, num_stages, resampler in (
        ("encoder", "down_blocks", config.num_res_blocks, "downsamplers"),
        ("decoder", "up_blocks", config.num_res_blocks + 1, "upsamplers"),
    ):
        places[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        places[f"{side}.middle.before"] = f"{side}.mid_block.resnets.0"
        places[f"{side}.middle.attention"] = f"{side}.mid_block.attentions.0"
        places[f"{side}.middle.after"] = f"{side}.mid_block.resnets.1"
        for level in range(num_levels):
            for i in range(num_stages):
                places[f"{side}.levels.{level}.{i}"] = f"{side}.{block}.{level}.resnets.{i}"
            if level < num_levels - 1:
                places[f"{side}.levels.{level}.{num_stages}"] = f"{side}.{block}.{level}.{resampler}.0"
    return {ours: (theirs,) for ours, theirs in places.items()}


def _dit_places(config: DiTConfig) -> dict[str, tuple[str, ...]]:
    # Every block there has its own embeddings, or copies of the only ones; the output takes the first block's.
    blocks = [f"transformer_blocks.{i}.norm1.emb" for i in range(config.depth)]
    first, others = (blocks[:1], blocks[1:]) if config.block_embeddings else (blocks, [])
    places = {
        "time.0": tuple(f"{block}.timestep_embedder.linear_1" for block in first),
        "time.2": tuple(f"{block}.timestep_embedder.linear_2" for block in first),
        "label": tuple(f"{block}.class_embedder.embedding_table" for block in first),
    }
    for i, block in enumerate(others):
        places[f"block_times.{i}.0"] = (f"{block}.timestep_embedder.linear_1",)
        places[f"block_times.{i}.2"] = (f"{block}.timestep_embedder.linear_2",)
        places[f"block_labels.{i}"] = (f"{block}.class_embedder.embedding_table",)
    return places | {
        "patches": ("pos_embed.proj",),
        "blocks": ("transformer_blocks",),
        "modulation_out": ("proj_out_1",),
        "out": ("proj_out_2",),
    }


def shapes_there(outline: nn.Module, found: list[Link]) -> dict[str, list[int]]:
    """The shape of every tensor that diffusers has of a network, by its name there."""
    shapes = {}
    ours = outline.state_dict()
    for link in found:
        shape = list(ours[link.ours].shape)
        if not link.are_copies:
            shape[0] //= len(link.theirs)
        shapes.update(dict.fromkeys(link.theirs, shape))
    return shapes


def modern_name(name: str) -> str:
    """The present name of a tensor of theirs that an old file may have under another."""
    parts = name.split(".")
    if "attentions." in name and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def to_theirs(state: Mapping[str, Tensor], found: list[Link]) -> dict[str, Tensor]:
    """Tensors under their names there; nothing is shared between them, as safetensors wants it."""
    tensors: dict[str, Tensor] = {}
    for link in found:
        tensor = state[link.ours]
        parts = [tensor] * len(link.theirs) if link.are_copies else tensor.chunk(len(link.theirs))
        tensors.update((name, part.detach().clone()) for name, part in zip(link.theirs, parts, strict=True))
    return tensors


def to_ours(read: Callable[[str], Tensor], found: list[Link]) -> dict[str, Tensor]:
    """Tensors under our names, from what reads one by its name there; of copies, the first."""
    state: dict[str, Tensor] = {}
    for link in found:
        first, *others = link.theirs
        fused = bool(others) and not link.are_copies
        state[link.ours] = torch.cat([read(name) for name in link.theirs]) if fused else read(first)
    return state


def copies_are_equal(read: Callable[[str], Tensor], found: list[Link]) -> bool:
    """Whether what should be copies of one tensor there are."""
    copies = [link.theirs for link in found if link.are_copies]
    return all(torch.equal(read(first), read(name)) for first, *others in copies for name in others)


def is_class_table(name: str) -> bool:
    """Whether a tensor of ours is a table of classes [K + 1, C]; a DiT has one, or one for each block."""
    return name == "label.weight" or name.startswith("block_labels.")
