"""What a generator and a discriminator minimise, as functions of the discriminator's logits, and gradient penalties."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.equalized import whole_precision

# Of these, logits have no meaning of their own: real and generated ones are compared.
COMPARING = ("wasserstein", "relativistic")
LOSSES = ("minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic")


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: a mean over samples, and patches where there are some.

    Args:
        name: of LOSSES.
        real, fake: logits [N, ...] of images and of generated ones; relativistic compares those of one place.
    """
    if name in ("minimax", "non_saturating"):  # Goodfellow 2014, Eq. 1
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if name == "hinge":  # Lim 2017, Eq. 4
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()
    if name == "least_squares":  # Mao 2017, Eq. 9
        return 0.5 * ((real - 1.0).square().mean() + fake.square().mean())
    if name == "wasserstein":  # Arjovsky 2017, Alg. 1
        return fake.mean() - real.mean()
    assert name == "relativistic", name  # Jolicoeur-Martineau 2019, Sec. 4.2, paired
    return F.softplus(fake - real).mean()


def generator_loss(name: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the generator minimises, as above; `real` is needed by relativistic alone."""
    if name == "minimax":
        return -F.softplus(fake).mean()
    if name == "non_saturating":  # Goodfellow 2014, Sec. 3
        return F.softplus(-fake).mean()
    if name == "least_squares":
        return 0.5 * (fake - 1.0).square().mean()
    if name in ("hinge", "wasserstein"):
        return -fake.mean()
    assert name == "relativistic", name
    assert real is not None
    return F.softplus(real - fake).mean()


def mean_signs(name: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """On which side logits of images and of generated ones lie: means of 1 for real and -1 for generated.

    Args:
        name, real, fake: as above.
    """
    boundary = undecided(name) if name not in COMPARING else 0.5 * (real.mean() + fake.mean())
    return (real - boundary).sign().mean(), (fake - boundary).sign().mean()


def undecided(name: str) -> float:
    """The logit that says neither real nor generated; to losses of COMPARING it means nothing."""
    return 0.5 if name == "least_squares" else 0.0


def squared_gradients(judge: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """How steep logits are at images: the square of each one's gradient, which can be differentiated in turn.

    Half their mean, times gamma, is R1 at real images and R2 at generated ones (Mescheder 2018, Eq. 9 and 10).

    Args:
        judge: images [N, C, H, W] -> logits [N, ...].
        image: at which; no gradient goes into them.

    Returns:
        The squared norms [N], at least fp32, and the logits.
    """
    image = image.detach().requires_grad_()
    logits = judge(image)
    with whole_precision(image, wanted=True):  # autocast would reach the derivatives of what is fp32, too
        (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return at_least_fp32(gradient).square().sum(dim=tuple(range(1, gradient.ndim))), logits


def interpolation_penalty(judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """(|gradient| - 1)^2 between images and generated ones, a mean (Gulrajani 2017, Alg. 1).

    Args:
        judge: as above.
        real, fake: [N, C, H, W].
        share: of the real ones in each point, in [0, 1], [N].
    """
    points = torch.lerp(fake.detach(), real, share[:, None, None, None])
    squares, _ = squared_gradients(judge, points)
    return ((squares + 1e-12).sqrt() - 1.0).square().mean()  # the root has no slope at 0
