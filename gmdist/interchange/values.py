"""A config.json of diffusers that is read key by key, and may choose nothing that our networks do not have."""

from collections.abc import Mapping
from typing import Any

from gmdist.errors import ConfigError

UNET, PLAIN_UNET, AUTOENCODER, DIT = "UNet2DConditionModel", "UNet2DModel", "AutoencoderKL", "DiTTransformer2DModel"

# What our networks leave no choice of; diffusers' defaults are the same.
_FIXED_OF_UNETS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
}
FIXED: dict[str, dict[str, Any]] = {
    UNET: _FIXED_OF_UNETS
    | {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "resnet_out_scale_factor": 1.0,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
    },
    PLAIN_UNET: _FIXED_OF_UNETS
    | {
        "mid_block_type": "UNetMidBlock2D",
        "downsample_type": "conv",
        "upsample_type": "conv",
        "add_attention": True,
    },
    AUTOENCODER: {"act_fn": "silu", "mid_block_add_attention": True},
    DIT: {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "dropout": 0.0,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
}
# What Transformer2DModel, which older DiTs are called, says besides: there is more that it could be.
_OF_OLDER = {DIT: {"attention_type": "default"}}
# What changes neither weights nor, in fp32, results.
_WITHOUT_EFFECT = {
    UNET: {"upcast_attention", "addition_embed_type_num_heads"},
    PLAIN_UNET: {"num_train_timesteps"},
    AUTOENCODER: {"force_upcast", "latents_mean", "latents_std"},  # a second stage measures its latents itself
    DIT: {"upcast_attention", "norm_num_groups"},
}
# What diffusers' training scripts write into the config.json of averaged weights.
_OF_AVERAGES = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
_MOST = 1 << 20  # of any number; what is larger is a mistake
MOST_LAYERS = 1 << 8  # in a row: the outline of a million would take hours


class Values:
    """A config.json whose every key is asked for; what is left at the end is checked by `finish`."""

    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        self.kind, self.values, self.asked = kind, values, set[str]()

    def raw(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        return self.values.get(key, default)

    def number(self, key: str, default: Any, kind: type = int, least: int = 1, most: int = _MOST) -> Any:
        """A finite number, an integer of at least `least`, or None where that is the default."""
        value = self.raw(key, default)
        if value is None and default is None:
            return None
        least = least if kind is int else -_MOST
        if type(value) not in (int, kind) or not least <= value <= most:
            name = "an integer" if kind is int else "a number"
            raise ConfigError(f"{key}: {value!r}; must be {name} from {least} to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r}; must be true or false")
        return value

    def size(self) -> int | None:
        """The side of the input; None where there is none, or two."""
        if isinstance(self.raw("sample_size", None), list | tuple):
            self.numbers("sample_size", [])
            return None
        return self.number("sample_size", None)

    def numbers(self, key: str, default: list[int], count: int | None = None, most: int = _MOST) -> list[int]:
        """Integers of at least 1; one stands for `count` equal ones."""
        value = self.raw(key, default)
        if type(value) is int and count is not None:
            value = [value] * count
        is_list = isinstance(value, list | tuple) and len(value) > 0
        if not is_list or not all(type(item) is int and 1 <= item <= most for item in value):
            raise ConfigError(f"{key}: {value!r}; must be a list of numbers of at least 1, and at most {most}")
        if count is not None and len(value) != count:
            raise ConfigError(f"{key}: {value!r}; must have one number for each of the {count} levels")
        return list(value)

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the key is missing."""
        value = self.raw(key, [])
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: {value!r}; must be a list")
        return [str(item) for item in value]

    def finish(self) -> None:
        """ConfigError for a value that chooses what our network does not have."""
        for key, value in self.values.items():
            if key in self.asked or key.startswith("_") or key in _WITHOUT_EFFECT[self.kind] | _OF_AVERAGES:
                continue
            if key == "act_fn" and value == "swish":  # another name of it
                value = "silu"
            fixed = (FIXED[self.kind] | _OF_OLDER.get(self.kind, {})).get(key)
            is_off = value is False or (isinstance(value, list | tuple) and all(one is False for one in value))
            if value != fixed and not (fixed is None and is_off):
                raise ConfigError(f"{key}: {value!r}; gmdist has {self.kind} with {fixed!r} alone")


def check_blocks(key: str, found: list[str], wanted: list[str]) -> None:
    """ConfigError for levels of other kinds than ours."""
    if found != wanted:
        raise ConfigError(f"{key}: {found}; gmdist's network has {wanted} there")
