"""Published config.json files of diffusers, and what neither side can express."""

import dataclasses
import math
from typing import Any

import pytest

from gmdist.errors import ConfigError
from gmdist.interchange.configs import config_json, spec_of
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig, dit_xl
from gmdist.nets.unet import UNetConfig, stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl

# What the published folders say.
SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD2 = SD1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = SD1 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_16 = VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DIT_XL = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}
PLAIN = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": 8,
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "in_channels": 1,
    "out_channels": 1,
}
DDPM = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}

_DIT = dataclasses.replace(dit_xl(), learned_sigma=True, feed_forward_norm_eps=1e-5)
_VAE = AutoencoderConfig(norm_groups=32)
_VAE_16 = AutoencoderConfig(latent_channels=16, quant_convs=False, norm_groups=32)
_PLAIN = UNetConfig(64, (1, 2), 2, (1,), head_channels=8, norm_groups=32, norm_eps=1e-5)
_DDPM = UNetConfig(norm_groups=32, frequency_shift=1, sines_first=True, asymmetric_downsampling=True)
PUBLISHED: dict[str, tuple[dict[str, Any], NetworkSpec]] = {
    "sd1": (SD1, NetworkSpec(stable_diffusion_1(), 4, size=64)),
    "sd1_inpainting": (SD1 | {"in_channels": 9}, NetworkSpec(stable_diffusion_1(), 9, out_channels=4, size=64)),
    "sd2": (SD2, NetworkSpec(stable_diffusion_2(), 4, size=96)),
    "sdxl": (SDXL, NetworkSpec(stable_diffusion_xl(), 4, size=128)),
    "vae": (VAE, NetworkSpec(_VAE, 3, size=1024, latent_scale=0.13025)),
    "vae_16": (VAE_16, NetworkSpec(_VAE_16, 3, size=1024, latent_scale=0.3611, latent_shift=0.1159)),
    "dit": (DIT_XL, NetworkSpec(_DIT, 4, num_classes=1000, size=32)),
    "plain": (PLAIN, NetworkSpec(_PLAIN, 1)),
    "ddpm_cifar10": (DDPM, NetworkSpec(_DDPM, 3, size=32)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    published, spec = PUBLISHED[name]
    assert spec_of(published) == spec
    written = config_json(spec)
    assert spec_of(written) == spec
    # What is written differently, or not at all, says nothing, or nothing that has an effect in fp32.
    different = {key for key, value in published.items() if value and value != written.get(key) and key[0] != "_"}
    assert different <= {"upcast_attention", "force_upcast", "norm_num_groups", "addition_embed_type_num_heads"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SD1, SD1 | {"act_fn": "swish"}),
        (SD1, SD1 | {"only_cross_attention": [False] * 4}),
        (VAE, VAE | {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),  # which its weights do not know of
        (PLAIN | {"attention_head_dim": 128}, PLAIN | {"attention_head_dim": None}),  # one head where there are any
    ],
)
def test_one_network_in_two_words(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert config_json(spec_of(one)) == config_json(spec_of(other))


def test_heads_of_levels_without_attention_do_not_count() -> None:
    levels = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    levels |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "block_out_channels": [32, 64]}
    one, other = (SD1 | levels | {"attention_head_dim": heads} for heads in ([4, 8], 8))
    assert config_json(spec_of(one)) == config_json(spec_of(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name: 'FluxTransformer2DModel'; must be one of"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu'; gmdist has UNet2DConditionModel with 'silu' alone"),
        ({"flip_sin_to_cos": "no"}, "flip_sin_to_cos: 'no'; must be true or false"),
        ({"freq_shift": 2}, "freq_shift: 2; must be 0 or 1"),
        ({"downsample_padding": 2}, "downsample_padding: 2; must be 1, or 0"),
        ({"downsample_padding": -1}, "downsample_padding: -1; must be an integer from 0"),
        ({"in_channels": -4}, "in_channels: -4; must be an integer from 1"),
        ({"in_channels": 10**30}, "in_channels: 10+; must be an integer from 1"),
        ({"out_channels": 0}, "out_channels: 0; must be an integer from 1"),
        ({"sample_size": -8}, "sample_size: -8; must be an integer from 1"),
        ({"sample_size": [64, -8]}, "sample_size: .*at least 1"),
        ({"num_class_embeds": -3}, "num_class_embeds: -3; must be an integer from 2"),
        ({"num_class_embeds": 1}, "num_class_embeds: 1; must be an integer from 2"),
        ({"layers_per_block": 0}, "layers_per_block: 0; must be an integer from 1"),
        ({"norm_eps": math.nan}, "norm_eps: nan; must be a number"),
        ({"dropout": math.inf}, "dropout: inf; must be a number"),
        ({"use_linear_projection": "a"}, "use_linear_projection: 'a'; must be true or false"),
        ({"only_cross_attention": [True, True, True, False]}, "only_cross_attention: "),
        ({"encoder_hid_dim": 768}, "encoder_hid_dim: 768; gmdist has UNet2DConditionModel with None alone"),
        ({"from_the_future": "yes"}, "from_the_future: 'yes'"),
        ({"class_embed_type": "projection"}, "class_embed_type: 'projection'"),
        ({"addition_embed_type": "image"}, "addition_embed_type: 'image'"),
        ({"cross_attention_dim": [768, 768, 1024, 768]}, "cross_attention_dim: "),
        ({"transformer_layers_per_block": [[1, 2], 1, 1, 1]}, "transformer_layers_per_block: "),
        ({"block_out_channels": [320, 480, 1280, 1280]}, "block_out_channels: .*multiples of the first"),
        ({"block_out_channels": "320"}, "block_out_channels: '320'"),
        ({"block_out_channels": [0, 0]}, "block_out_channels: .*at least 1"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types: "),
        ({"down_block_types": None}, "down_block_types: None; must be a list"),
        ({"up_block_types": SD1["down_block_types"]}, "up_block_types: "),
        ({"attention_head_dim": [8, 8, 8, 4]}, "attention_head_dim: .*equal numbers or equal widths"),
        ({"attention_head_dim": 7}, r"num_heads: 7; must divide .* \(attention_head_dim in config.json\)"),
        ({"norm_num_groups": 7}, "norm_groups: 7; must divide"),
        ({"in_channels": "4"}, "in_channels: '4'; must be an integer"),
        ({"norm_eps": "small"}, "norm_eps: 'small'; must be a number"),
    ],
)
def test_what_our_unet_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(SD1 | changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VAE | {"norm_num_groups": 48}, "norm_groups: 48; must divide the widths .*, as 32 does"),
        (VAE | {"norm_num_groups": 0}, "norm_num_groups: 0; must be an integer from 1"),
        (VAE | {"scaling_factor": 0}, "scaling_factor: 0; must be above 0"),
        (VAE | {"scaling_factor": -0.5}, "scaling_factor: -0.5; must be above 0"),
        (VAE | {"scaling_factor": math.nan}, "scaling_factor: nan; must be a number"),
        (VAE | {"shift_factor": math.inf}, "shift_factor: inf; must be a number"),
        (VAE | {"use_quant_conv": "a", "use_post_quant_conv": "a"}, "use_quant_conv: 'a'; must be true or false"),
        (VAE | {"sample_size": 0}, "sample_size: 0; must be an integer from 1"),
        (VAE | {"latent_channels": 0}, "latent_channels: 0; must be an integer from 1"),
        (VAE | {"out_channels": 4}, "out_channels: 4; must be in_channels, 3"),
        (VAE | {"use_quant_conv": False}, "use_post_quant_conv: True; must be as use_quant_conv"),
        (VAE | {"mid_block_add_attention": False}, "mid_block_add_attention: False"),
        (DIT_XL | {"out_channels": 6}, "out_channels: 6; must be 4, or 8"),
        (DIT_XL | {"sample_size": 0}, "sample_size: 0; must be an integer from 1"),
        (DIT_XL | {"num_embeds_ada_norm": 0}, "num_embeds_ada_norm: 0; must be an integer from 1"),
        (DIT_XL | {"num_attention_heads": -16, "attention_head_dim": -72}, "num_attention_heads: -16; must be"),
        (DIT_XL | {"patch_size": 0}, "patch_size: 0; must be an integer from 1"),
        (DIT_XL | {"attention_type": "gated"}, "attention_type: 'gated'; gmdist has .* with 'default' alone"),
        (DIT_XL | {"sample_size": 33}, "sample_size: 33; must be a multiple of the patch, 2"),
        (DIT_XL | {"sample_size": 128}, "sample_size: 128; from 128 on a Transformer2DModel scales its positions"),
        (SDXL | {"flip_sin_to_cos": False}, "flip_sin_to_cos: False; must be 0 and true with a vector of sizes"),
        (SDXL | {"freq_shift": 1}, "freq_shift: 1, .*must be 0 and true with a vector of sizes"),
        (DIT_XL | {"dropout": 0.1}, "dropout: 0.1; gmdist has DiTTransformer2DModel with 0.0 alone"),
        (DIT_XL | {"norm_type": "layer_norm"}, "norm_type: 'layer_norm'; gmdist has Transformer2DModel with"),
        (DIT_XL | {"norm_eps": 1.5}, r"feed_forward_norm_eps: 1.5; .*\(norm_eps in config.json\)"),
        (PLAIN | {"block_out_channels": [33, 66]}, r"channels: 33; .*\(block_out_channels in config.json\)"),
        (PLAIN | {"attention_head_dim": 5}, r"head_channels: 5; must divide .* \(attention_head_dim in config.json\)"),
        (PLAIN | {"attention_head_dim": 0}, "attention_head_dim: 0; must be an integer from 1"),
        (PLAIN | {"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier'; gmdist has UNet2DModel with"),
        (PLAIN | {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}, "down_block_types: "),
        ({}, "_class_name: 'None'"),
    ],
)
def test_what_our_others_cannot_be_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(config)


@pytest.mark.parametrize(("widths", "groups"), [([32, 64], 8), ([32, 64], 32), ([64, 64], 32), ([16, 32, 32], 4)])
def test_first_stages_of_small_widths(widths: list[int], groups: int) -> None:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * len(widths)}
    blocks["up_block_types"] = ["UpDecoderBlock2D"] * len(widths)
    spec = spec_of(VAE | blocks | {"block_out_channels": widths, "norm_num_groups": groups})
    assert spec.norm_groups() == groups
    written = config_json(spec)
    assert (written["block_out_channels"], written["norm_num_groups"]) == (widths, groups)


def test_a_transformer_saved_in_the_older_class() -> None:
    older = {"attention_type": "default", "caption_channels": None, "double_self_attention": False}
    assert spec_of(DIT_XL | older) == PUBLISHED["dit"][1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NetworkSpec(UNetConfig(multipliers=(2, 4)), 3), "multipliers: .*the first must be 1"),
        (
            NetworkSpec(UNetConfig(channels=32), 3),
            "norm_groups: null; the norms of widths .* groups, and diffusers has one number for all: train it with .*8",
        ),
        (
            NetworkSpec(UNetConfig(attention_levels=(0, 1), num_heads=2), 3),
            "num_heads: 2; the heads of diffusers' UNet2DModel have one width at all levels: set head_channels",
        ),
        (NetworkSpec(UNetConfig(vector_channels=8), 3), "vector_channels: 8; diffusers' UNet2DModel, without context"),
        (NetworkSpec(UNetConfig(context_channels=8, vector_channels=8), 3), "vector_channels: 8; .*pooled text"),
        (NetworkSpec(AutoencoderConfig(channels=32), 3), "norm_groups: null; .*: train it with norm_groups: 8"),
        (NetworkSpec(DiTConfig(qk_norm=True), 4, 10, size=8), "qk_norm: true; diffusers' DiTTransformer2DModel"),
        (NetworkSpec(DiTConfig(), 4, 0, size=8), "num_classes: 0; diffusers' DiTTransformer2DModel"),
        (NetworkSpec(DiTConfig(frequency_shift=0), 4, 10, size=8), "frequency_shift: 0; "),
    ],
)
def test_what_diffusers_cannot_be_is_named(spec: NetworkSpec, message: str) -> None:
    assert spec.config.problem() is None
    with pytest.raises(ConfigError, match=message):
        config_json(spec)
