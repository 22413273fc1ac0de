"""What the diffusion families share: the loss of a denoiser on clean data, and sampling with guidance."""

import torch
from torch import Tensor

from gmdist import rng
from gmdist.diffusion.process import Diffusion, DiffusionConfig
from gmdist.nets.unet import UNet, UNetConfig


def denoiser_problem(unet: UNetConfig, diffusion: DiffusionConfig, label_dropout: float) -> str | None:
    """Why these settings of a denoiser cannot be, as "key: value; what is valid"; None if they can."""
    if problem := unet.problem():
        return f"unet.{problem}"
    if problem := diffusion.problem():
        return f"diffusion.{problem}"
    if not 0.0 <= label_dropout <= 1.0:
        return f"label_dropout: {label_dropout}; must be between 0 and 1"
    return None


def drop_labels(label: Tensor, keys: Tensor, num_classes: int, probability: float, seed: int) -> Tensor:
    """Replace labels by "no class" (the number num_classes) with a probability, keyed by sample. int64 [N]."""
    dropped = rng.uniform(seed, "label_dropout", keys) < probability
    return torch.where(dropped, num_classes, label)


def denoising_loss(
    network: UNet, diffusion: Diffusion, x0: Tensor, label: Tensor | None, keys: Tensor, seed: int
) -> Tensor:
    """Mean squared error of the prediction at a random timestep (Ho 2020, Eq. 14), for each sample.

    Args:
        x0: clean data [N, C, H, W].
        label: int64 [N] or None.
        keys: int64 [N]; noise and timestep depend on the seed and these alone.

    Returns:
        [N].
    """
    timesteps = rng.integers(seed, "timestep", keys, diffusion.num_timesteps)
    eps = rng.normal(seed, "noise", keys, tuple(x0.shape[1:]))
    x, target = diffusion.noised(x0, eps, timesteps)
    return (network(x, timesteps, label) - target).square().mean(dim=(1, 2, 3))


def sample_denoiser(
    network: UNet,
    diffusion: Diffusion,
    keys: Tensor,
    shape: tuple[int, int, int],
    label: Tensor | None,
    num_classes: int,
    seed: int,
    clip: float | None = None,
) -> Tensor:
    """Draw clean data [N, *shape] for keys [N], with classifier-free guidance where labels are given."""
    guidance = diffusion.config.sampler.guidance

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        if label is None or guidance == 1.0:
            return network(x, timesteps, label)
        both = torch.cat([label, torch.full_like(label, num_classes)])
        conditional, free = network(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return free + guidance * (conditional - free)  # Ho 2022, Eq. 6

    start = rng.normal(seed, "sample", keys, shape)
    return diffusion.sample(predict, start, lambda i: rng.normal(seed, f"sample/{i}", keys, shape), clip)
