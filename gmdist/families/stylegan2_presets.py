"""The configurations that StyleGAN2-ADA's users know by name (Karras 2020, "Training GANs with limited data")."""

from typing import Any

from gmdist.errors import ConfigError

PRESETS = ("auto", "stylegan2", "paper256", "paper512", "paper1024", "cifar")


def preset_settings(name: str, image_size: int, num_workers: int) -> dict[str, Any]:
    """What a preset sets of a run's config, as a tree; `auto` goes by the images' sides and the number of workers.

    ConfigError for a name that there is not.
    """
    if name == "auto":
        batch_size = max(min(num_workers * min(4096 // image_size, 32), 64), num_workers)
        return _settings(
            batch_size,
            group=min(batch_size // num_workers, 4),
            channel_base=32768 if image_size >= 512 else 16384,
            lr=0.002 if image_size >= 1024 else 0.0025,
            r1_gamma=0.0002 * image_size**2 / batch_size,
            halflife_kimg=batch_size * 10 / 32,
            ramp=0.05,
            mapping_layers=2,
        )
    if name == "stylegan2":
        return _settings(32, group=4, channel_base=32768, lr=0.002, r1_gamma=10.0, halflife_kimg=10.0)
    if name == "paper256":
        return _settings(64, group=8, channel_base=16384, lr=0.0025, r1_gamma=1.0, halflife_kimg=20.0)
    if name == "paper512":
        return _settings(64, group=8, channel_base=32768, lr=0.0025, r1_gamma=0.5, halflife_kimg=20.0)
    if name == "paper1024":
        return _settings(32, group=4, channel_base=32768, lr=0.002, r1_gamma=2.0, halflife_kimg=10.0)
    if name == "cifar":
        settings = _settings(
            64, group=32, channel_base=32768, lr=0.0025, r1_gamma=0.01, halflife_kimg=500.0, ramp=0.05, mapping_layers=2
        )
        settings["family"] |= {"path_length": {"weight": 0.0}, "style_mixing": 0.0}
        settings["family"]["discriminator"]["architecture"] = "orig"
        return settings
    raise ConfigError(f"family.preset: '{name}'; must be one of {', '.join(PRESETS)}, or null")


def _settings(
    batch_size: int,
    *,
    group: int,
    channel_base: int,
    lr: float,
    r1_gamma: float,
    halflife_kimg: float,
    ramp: float | None = None,
    mapping_layers: int = 8,
) -> dict[str, Any]:
    optim = {"name": "adam", "lr": lr, "betas": [0.0, 0.99], "eps": 1e-8}
    return {
        "family": {
            "objective": {"r1_gamma": r1_gamma, "penalty_every": 16},
            "generator": {"channel_base": channel_base, "mapping_layers": mapping_layers},
            "discriminator": {"channel_base": channel_base, "minibatch_std_group": group},
        },
        "data": {"batch_size": batch_size},
        "optim": {"generator": dict(optim), "discriminator": dict(optim)},
        "train": {"ema_halflife_kimg": halflife_kimg, "ema_ramp": ramp},
    }
