"""What several tests use: small families, an in-memory data set, one trainer call, processes of a small job."""

import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gmdist import rng, s3
from gmdist.data.mix import Fingerprint
from gmdist.data.tape import Tape, digest, owned
from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.families import CATALOGUE
from gmdist.families.adversarial import DiscriminatorConfig
from gmdist.families.augmentation import AugmentConfig
from gmdist.families.autoencoder import PlainAutoencoderConfig
from gmdist.families.autoencoder_kl import AutoencoderKLConfig
from gmdist.families.code_sampler import CodeSamplerConfig
from gmdist.families.conditional_gan import ConditionalGANConfig
from gmdist.families.conditioning import ConditioningConfig, EncoderConfig
from gmdist.families.cyclegan import CycleGANConfig
from gmdist.families.dcgan import DCGANConfig
from gmdist.families.ddpm import DDPMConfig
from gmdist.families.family import Family, Phase, Surroundings
from gmdist.families.gan import ObjectiveConfig
from gmdist.families.latent_diffusion import LatentDiffusionConfig
from gmdist.families.likelihoods import LikelihoodConfig
from gmdist.families.pixelcnn import PixelCNNConfig
from gmdist.families.stylegan2 import PathLengthConfig, StyleGAN2Config
from gmdist.families.transformer_prior import TransformerPriorConfig
from gmdist.families.vae import VAEConfig
from gmdist.families.vanilla_gan import VanillaGANConfig
from gmdist.families.vit_vqvae import ViTVQVAEConfig
from gmdist.families.vq_vae import VQVAEConfig
from gmdist.nets import dcgan
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.causal_transformer import CausalTransformerConfig
from gmdist.nets.convolutional import ConvolutionalConfig
from gmdist.nets.cyclegan import TranslatorConfig
from gmdist.nets.dit import DiTConfig
from gmdist.nets.pixelcnn import GatedPixelCNNConfig
from gmdist.nets.quantizer import QuantizerConfig
from gmdist.nets.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from gmdist.nets.stylegan2_generator import StyleGAN2GeneratorConfig
from gmdist.nets.text import TextConfig
from gmdist.nets.unet import UNetConfig
from gmdist.nets.vit import ViTConfig
from gmdist.train.config import TrainConfig
from gmdist.train.hooks import Hooks, Outcome
from gmdist.train.optim import OptimConfig
from gmdist.train.state import RunIdentity
from gmdist.train.trainer import Trainer
from tests.patch_means import PatchMeans, PatchMeansConfig

SIZE, CHANNELS, CLASSES = 16, 1, 4
ADAM = OptimConfig(lr=2e-3, betas=(0.9, 0.99))

_UNET = UNetConfig(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2, dropout=0.1)
_DIT = DiTConfig(channels=32, depth=2, num_heads=2, patch_size=2, qk_norm=True)
_DIFFUSION = DiffusionConfig(schedule="cosine", prediction="v", sampler=SamplerConfig(num_steps=4, guidance=2.0))

_TEXT = ConditioningConfig("text", text=EncoderConfig(transformer=TextConfig(16, 1, 2, max_length=8)))
_CODES = CodeSamplerConfig(temperature=0.9, top_k=200, top_p=0.95, guidance=3.0)
_AUTOENCODER = AutoencoderConfig(8, (1, 2), 1, 2)
_VIT = ViTConfig(16, 1, 2, 32, 8)
_FACTORIZED = QuantizerConfig(32, 4, normalize=True, learned_by="gradient", kmeans_steps=0)
_CONVOLUTIONAL = ConvolutionalConfig((16, 32), 1)

# Unless the discriminator takes all real images for generated ones, p grows by a third every two steps.
_ADAPTING = AugmentConfig("ada", target=-0.99, speed_kimg=0.05, interval=2)
_DCGAN = dcgan.DCGANConfig(8, 16, 16, 32)
_STYLEGAN2 = StyleGAN2Config(
    objective=ObjectiveConfig(r1_gamma=1.0, penalty_every=2),
    generator=StyleGAN2GeneratorConfig(16, 16, 2, 256, 16, num_bf16_sides=1),
    discriminator=StyleGAN2DiscriminatorConfig(256, 16, minibatch_std_group=0, mapping_layers=2, num_bf16_sides=1),
    path_length=PathLengthConfig(every=2, batch_shrink=1),
)

# One small config for each family of the catalogue, and more as "family/variant".
SMALL: dict[str, Any] = {
    "autoencoder": PlainAutoencoderConfig(_CONVOLUTIONAL, 16),
    "autoencoder_kl": AutoencoderKLConfig(_AUTOENCODER),
    "autoencoder_kl/discriminator": AutoencoderKLConfig(
        _AUTOENCODER, discriminator=DiscriminatorConfig(8, 1, adaptive=False, start_images=0)
    ),
    "conditional_gan": ConditionalGANConfig(networks=_DCGAN),
    "conditional_gan/concatenation": ConditionalGANConfig(
        ObjectiveConfig("hinge", r1_gamma=0.1), networks=_DCGAN, conditioning="concatenation"
    ),
    "cyclegan": CycleGANConfig(TranslatorConfig(8, 1), 8, 1, pool_size=0),
    "dcgan": DCGANConfig(ObjectiveConfig("least_squares"), AugmentConfig("diffaugment"), _DCGAN),
    "dcgan/ada": DCGANConfig(augmentation=_ADAPTING, networks=_DCGAN),
    "ddpm": DDPMConfig(unet=_UNET, diffusion=_DIFFUSION),
    "gan": VanillaGANConfig(ObjectiveConfig("relativistic", 0.1, 0.1), latent_channels=8, hidden_channels=32),
    "gan/wasserstein": VanillaGANConfig(ObjectiveConfig("wasserstein", interpolation_weight=10.0), hidden_channels=32),
    "latent_diffusion": LatentDiffusionConfig(first_stage="first", unet=_UNET, diffusion=_DIFFUSION),
    "latent_diffusion/dit": LatentDiffusionConfig(first_stage="first", network="dit", dit=_DIT, diffusion=_DIFFUSION),
    "vae": VAEConfig(_CONVOLUTIONAL, 8, LikelihoodConfig(scale=0.1), iwae_samples=2),
    "vae/logistic": VAEConfig(_CONVOLUTIONAL, 8, LikelihoodConfig("discretized_logistic", 0.02), iwae_samples=2),
    "pixelcnn": PixelCNNConfig(network=GatedPixelCNNConfig(32, 2, 3, dropout=0.1), sampler=_CODES),
    "pixelcnn/tokens": PixelCNNConfig(first_stage="tokens", network=GatedPixelCNNConfig(16, 2, 3), sampler=_CODES),
    "stylegan2": _STYLEGAN2,
    "stylegan2/ada": dataclasses.replace(
        _STYLEGAN2,
        augmentation=AugmentConfig("ada", p=0.5),
        discriminator=dataclasses.replace(_STYLEGAN2.discriminator, minibatch_std_group=2),
        path_length=PathLengthConfig(every=2, batch_shrink=2),
        conditional=False,
        truncation=0.7,
    ),
    "transformer_prior": TransformerPriorConfig(
        first_stage="tokens", transformer=CausalTransformerConfig(32, 2, 4), sampler=_CODES
    ),
    "ddpm/text": DDPMConfig(unet=_UNET, diffusion=_DIFFUSION, conditioning=_TEXT),
    "vq_vae": VQVAEConfig(_CONVOLUTIONAL, 8, QuantizerConfig(16, revive=True)),
    "vq_vae/gradient": VQVAEConfig(
        _CONVOLUTIONAL,
        8,
        QuantizerConfig(16, code_channels=4, normalize=True, learned_by="gradient", estimator="rotation"),
    ),
    "vit_vqvae": ViTVQVAEConfig(4, _VIT, _VIT, _FACTORIZED),
    "vit_vqvae/discriminator": ViTVQVAEConfig(
        8,
        _VIT,
        _VIT,
        _FACTORIZED,
        l2_weight=10.0,
        discriminator=DiscriminatorConfig(
            weight=0.01,
            adaptive=False,
            start_images=0,
            name="stylegan2",
            stylegan2=StyleGAN2DiscriminatorConfig(128, 16, minibatch_std_group=0),
        ),
    ),
}


def small_family(name: str, seed: int = 0, **changes: Any) -> Family:
    """A small instance of SMALL, the same for the same seed; `changes` are of its config."""

    def first_stage(run: str) -> Family:
        if run == "tokens":
            return PatchMeans(PatchMeansConfig(), Surroundings(SIZE, CHANNELS, 0, seed, first_stage)).eval()
        first = small_family("autoencoder_kl", seed + 1).eval()
        with torch.no_grad():  # a narrow posterior, as a trained one has: or latents would be noise
            first.autoencoder.encoder.quant.bias[2:] = -8.0
        return first

    surroundings = Surroundings(SIZE, CHANNELS, CLASSES, seed, first_stage)
    torch.manual_seed(seed)
    return CATALOGUE[name.partition("/")[0]][0](dataclasses.replace(SMALL[name], **changes), surroundings)


def optimizers(family: Family, config: OptimConfig = ADAM) -> dict[str, OptimConfig]:
    """The same optimizer for every child that the family trains."""
    return {phase.trains: config for phase in family.phases()}


@dataclass
class Part:
    """A part of a batch, as the trainer takes it."""

    batch: dict[str, Tensor]
    digest: int
    quarantined: list[dict[str, Any]] = field(default_factory=list)

    def batch_on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor if name == "caption" else tensor.to(device) for name, tensor in self.batch.items()}


class MemorySource:
    """A data set in memory: smooth random images, in the order of a tape."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size
        self.max_bad = 1
        shards = [num_samples // 2, num_samples - num_samples // 2]
        self.tape = Tape(shards, seed=0, lanes=2, block=8, manifest="memory")
        coarse = rng.normal(5, "images", torch.arange(num_samples), (CHANNELS, 4, 4))
        self.images = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").clamp(-1, 1)

    def part(self, numbers: np.ndarray) -> Part:
        """The samples with these numbers."""
        shard, index = self.tape.locate(numbers)
        which = torch.from_numpy(shard * (self.num_samples // 2) + index)
        label = which % CLASSES
        caption = torch.stack([torch.full_like(label, ord("a")), label + ord("a")], dim=1).to(torch.uint8)
        batch = {"image": self.images[which], "label": label, "key": torch.from_numpy(numbers), "caption": caption}
        batch["image_b"] = -self.images.roll(7, 0)[which]
        return Part(batch, digest(numbers, which.numpy()))

    def counters(self) -> dict[str, float]:
        return {}

    def notes(self) -> list[str]:
        return []

    def batches(self, start: int) -> Iterator[Part]:
        """This worker's part of one batch after another."""
        while True:
            yield self.part(owned(start, start + self.batch_size, self.rank, self.world_size))
            start += self.batch_size

    def sweep(self, batch_size: int) -> Iterator[Part]:
        """Every sample once."""
        numbers = owned(0, self.num_samples, self.rank, self.world_size)
        for i in range(0, len(numbers), batch_size):
            yield self.part(numbers[i : i + batch_size])

    def first(self, count: int) -> Part:
        """The first samples."""
        return self.part(np.arange(count, dtype=np.int64))


def make_trainer(
    family: Family,
    run_dir: Path,
    *,
    num_samples: int = 48,
    batch_size: int = 8,
    optim: OptimConfig = ADAM,
    device: torch.device | None = None,
    hooks: Hooks | None = None,
    rank: int = 0,
    world_size: int = 1,
    **train: Any,
) -> Trainer:
    """A trainer on a MemorySource."""
    settings: dict[str, Any] = {
        "num_steps": 6,
        "log_every": 2,
        "checkpoint_every": 3,
        "sample_every": None,
        "ema_halflife_kimg": 0.05,
        "keep_checkpoints": None,
    }
    source = MemorySource(num_samples, batch_size, rank, world_size)
    identity = RunIdentity("test", batch_size, Fingerprint((1,), (source.tape.fingerprint,)))
    config = TrainConfig(**(settings | train))
    return Trainer(
        family,
        config,
        optimizers(family, optim),
        identity,
        str(run_dir),
        source,
        source,
        device,
        hooks,
    )


def fit(family: Family, run_dir: Path, **settings: Any) -> Outcome:
    """Train a family on a MemorySource and close everything."""
    trainer = make_trainer(family, run_dir, **settings)
    try:
        return trainer.fit()
    finally:
        trainer.close()


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def deletes_refused(code: str, only: str = "", times: int = 10**6) -> Iterator[None]:
    """Let S3 answer DeleteObjects with 200 and such an error for each key that has `only` in it, so many times."""
    answers, real = iter(range(times)), s3.client().delete_objects

    def answer(Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:  # noqa: N803
        refused = [] if next(answers, None) is None else [one for one in Delete["Objects"] if only in one["Key"]]
        if deleted := [one for one in Delete["Objects"] if one not in refused]:
            real(Bucket=Bucket, Delete={"Objects": deleted})
        return {"Errors": [one | {"Code": code, "Message": "no"} for one in refused]} if refused else {}

    with mock.patch.object(s3.client(), "delete_objects", answer):
        yield


class Linear(Family):
    """A family of one linear network, whose gradients are easy to compute by hand."""

    averaged = ("network",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Sequential(nn.Linear(SIZE * SIZE, 8), nn.Tanh(), nn.Linear(8, 1))

    def phases(self) -> list[Phase]:
        return [Phase("net", "network", self.loss)]

    def loss(self, batch, seen):
        target = batch["label"].float()[:, None]
        loss = (self.network(batch["image"].flatten(1)) - target).square().mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys, condition=None):
        return torch.zeros(len(keys), CHANNELS, SIZE, SIZE)


def run_workers(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run function(rank, world_size, *arguments) in as many processes of one gloo job.

    They are forks of a process that has imported what takes long, and has done nothing else.
    """
    multiprocessing.set_forkserver_preload(["tests.preload"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_enter, (world_size, port, function, arguments), nprocs=world_size, start_method="forkserver")


def _enter(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *arguments)
    finally:
        dist.barrier()
        dist.destroy_process_group()
