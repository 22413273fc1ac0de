"""A small data set, a first stage of few weights trained on it, and second stages, for tests of latent caches."""

from pathlib import Path

import numpy as np
import torch

from gmdist.config import Config, load
from gmdist.data.pack import write_shards
from gmdist.images import png
from gmdist.start import train_worker

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent.parent / "configs/digits"
SIZE, COUNT, SHARDS, CLASSES = 16, 26, 3, 4
ALONE = ["cluster.num_workers=1"]
TRAIN = ["train.zero_stage=0", "train.sample_every=null", "train.evaluate_every=null", "train.log_every=1", *ALONE]
DATA = [f"data.image_size={SIZE}", f"data.num_classes={CLASSES}", "data.test=null", "data.batch_size=8"]
CACHED = ["data.image=false", "data.arrays=[moments.npy]"]
SOME_BAD = ["data.max_bad_fraction=0.1"]


def picture(i: int) -> np.ndarray:
    """Number i of the images: smooth, and far from its mirror image."""
    x, y = np.meshgrid(np.linspace(0, 1, SIZE), np.linspace(0, 1, SIZE))
    return (255 * (0.5 + 0.5 * np.sin(3 * x + 5 * y * (i % 5) + i))).astype(np.uint8)[:, :, None]


def write(folder: Path, changed: dict[int, dict[str, bytes]] | None = None) -> str:
    samples = []
    for i in range(COUNT):
        members = {"png": png(picture(i)), "cls": b"%d" % (i % CLASSES), "txt": f"wave {i}".encode()}
        samples.append((f"k{i}", members | (changed or {}).get(i, {})))
    write_shards(samples, str(folder), num_shards=SHARDS)
    return str(folder)


def train_first_stage(folder: Path, data: str, *more: str) -> str:
    shape = "family.autoencoder={channels: 8, multipliers: [1, 2], num_res_blocks: 1, latent_channels: 2}"
    # After three steps latents must already depend on the image.
    loss = ["family.kl_weight=1.0e-3", "family.perceptual.name=none", "optim.autoencoder.lr=1.0e-3"]
    settings = [shape, *loss, *TRAIN, *DATA, f"data.train={data}", f"run.dir={folder}", "train.num_steps=3"]
    train_worker(load(str(CONFIGS / "autoencoder_kl.yaml"), [*settings, "train.checkpoint_every=1", *more]), CPU)
    return str(folder)


def second_stage(stage: str, data: str, run: Path, *more: str) -> Config:
    unet = "family.unet={channels: 16, multipliers: [1, 2], num_res_blocks: 1, attention_levels: [], num_heads: 2}"
    settings = [unet, *TRAIN, *DATA, f"family.first_stage={stage}", f"data.train={data}", f"run.dir={run}"]
    return load(str(CONFIGS / "latent_diffusion.yaml"), [*settings, "data.block=4", *SOME_BAD, *more])
