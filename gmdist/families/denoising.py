"""What the diffusion families compute: the loss of a denoiser on clean data, by noise level too, and samples."""

import torch
from torch import Tensor

from gmdist import rng
from gmdist.diffusion.process import Diffusion, Predict, PredictBoth
from gmdist.families.family import Metrics

NOISE_BINS = 8  # of the validation loss


def denoising_loss(predict: Predict, diffusion: Diffusion, x0: Tensor, keys: Tensor, seed: int) -> Tensor:
    """The weighted squared error of the prediction at a random time, a mean over each sample's elements.

    Args:
        predict: the network, (scaled x_t [N, ...], conditioning on the time [N]) -> output [N, ...].
        diffusion: schedule, parameterization and weight.
        x0: clean data [N, ...].
        keys: int64 [N]; noise and time depend on the seed and these alone.
        seed: of the run.

    Returns:
        [N].
    """
    times = diffusion.times_at(rng.quantiles(seed, "timestep", keys))
    eps = rng.normal(seed, "noise", keys, tuple(x0.shape[1:]))
    return diffusion.weights(times) * _errors(predict, diffusion, x0, eps, times)


def noise_level_losses(predict: Predict, diffusion: Diffusion, x0: Tensor, keys: Tensor, seed: int) -> Metrics:
    """The validation loss, and what it is made of: each sample is evaluated once in each eighth of the noise levels.

    The eighths are equally probable in training, so the mean over them estimates the training loss with less variance
    than a time for each sample does; and every batch fills them all, so means over batches are means over samples.

    Args:
        predict: as in `denoising_loss`, in eval mode and with every condition given.
        diffusion: schedule, parameterization and weight.
        x0: clean data [N, ...].
        keys: int64 [N]; noise and times depend on the seed and these alone.
        seed: of the run.

    Returns:
        `loss`, the mean of the weighted losses, and `loss_noise_0` (the least noise) to `loss_noise_7`, those of the
        unweighted ones in each eighth.
    """
    weighted, metrics = [], {}
    for part in range(NOISE_BINS):
        times = diffusion.times_at((part + rng.quantiles(seed, f"timestep/{part}", keys)) / NOISE_BINS)
        eps = rng.normal(seed, f"noise/{part}", keys, tuple(x0.shape[1:]))
        errors = _errors(predict, diffusion, x0, eps, times)
        weighted.append((diffusion.weights(times) * errors).mean())
        metrics[f"loss_noise_{part}"] = errors.mean().detach()
    return {"loss": torch.stack(weighted).mean().detach(), **metrics}


def _errors(predict: Predict, diffusion: Diffusion, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
    """The unweighted squared error of the output, a mean over each sample's elements. [N]."""
    noised = diffusion.noised(x0, eps, times)
    return (predict(noised.seen, noised.told) - noised.target).square().flatten(1).mean(dim=1)


def sample_denoiser(
    predict: Predict,
    predict_both: PredictBoth | None,
    diffusion: Diffusion,
    keys: Tensor,
    shape: tuple[int, ...],
    seed: int,
    clip: float | None = None,
) -> Tensor:
    """Draw clean data [N, *shape] for keys [N] with the configured sampler.

    Args:
        predict: the network with its condition, if it has one.
        predict_both: its outputs with and without the condition, for classifier-free guidance; None for no guidance.
        diffusion: schedule, parameterization and sampler.
        keys: int64 [N]; a sample depends on the seed and its key alone.
        shape: of one sample.
        seed: of the run.
        clip: bound of the clean data's absolute values; None for data without bounds.
    """
    start = rng.normal(seed, "sample", keys, shape)
    return diffusion.sample(predict, start, lambda i: rng.normal(seed, f"sample/{i}", keys, shape), predict_both, clip)
