"""Tiny runs for tests of `gmdist export`: an autoencoder of few weights, and denoisers of its latents."""

from pathlib import Path

import numpy as np
import torch

from gmdist.config import load
from gmdist.data.pack import write_shards
from gmdist.images import png
from gmdist.start import train_worker

CONFIGS = Path(__file__).parent.parent / "configs/digits"
SIZE, CHANNELS, CLASSES, COUNT = 16, 3, 4, 16
FIRST_STAGE = [
    "family.autoencoder={channels: 16, multipliers: [1, 2], norm_groups: 4, num_res_blocks: 1, latent_channels: 2}",
    "family.learned_logvar=true",
    "family.kl_weight=1.0e-3",
    "family.perceptual.name=none",
]
_SIZES = "channels: 16, multipliers: [1, 2], num_res_blocks: 1, attention_levels: [0], num_heads: 2, norm_groups: 4"
UNET = f"family.unet={{{_SIZES}}}"
DIT = ["family.network=dit", "family.dit={channels: 16, depth: 2, num_heads: 2}"]
_TRAIN = ["train.zero_stage=0", "train.sample_every=null", "train.evaluate_every=null", "train.num_steps=2"]
# The averaged weights are nearly the last ones, and a large step leaves no branch at zero.
_TRAIN += ["train.ema_halflife_kimg=0.001", "train.ema_ramp=null", "data.test=null", "data.batch_size=4"]
_IMAGES = [f"data.image_size={SIZE}", f"data.channels={CHANNELS}", f"data.num_classes={CLASSES}"]


def write_images(folder: Path) -> str:
    """A data set of noise with labels and captions."""
    random = np.random.default_rng(0)
    samples = []
    for i in range(COUNT):
        image = png(random.integers(0, 256, (SIZE, SIZE, CHANNELS), np.uint8))
        samples.append((f"k{i}", {"png": image, "cls": b"%d" % (i % CLASSES), "txt": b"a cat"}))
    write_shards(samples, str(folder))
    return str(folder)


def settings(config: str, data: str, run: Path, *more: str) -> list[str]:
    """Arguments of `gmdist train`: a config and its overrides."""
    child = "autoencoder" if config == "autoencoder_kl" else "denoiser"
    optim = f"optim={{{child}: {{lr: 0.02}}}}"
    family = FIRST_STAGE if config == "autoencoder_kl" else []
    if config == "latent_diffusion":
        family = ["family.diffusion.sampler.guidance_interval=null"]  # diffusers has none
    where = [f"data.train={data}", f"run.dir={run}"]
    return [str(CONFIGS / f"{config}.yaml"), *_TRAIN, *_IMAGES, optim, *family, *where, *more]


def train(config: str, data: str, run: Path, *more: str) -> str:
    """Train two steps without Ray; returns the run's folder."""
    path, *overrides = settings(config, data, run, *more)
    train_worker(load(path, overrides), torch.device("cpu"))
    return str(run)
