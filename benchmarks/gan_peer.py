"""The training step of stylegan2-pytorch 1.9.0 on the CPU, which its own Trainer refuses to run on."""

import importlib
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What the package imports for its data sets, its log and its command line.
_NOT_NEEDED = ("aim", "fire", "torchvision", "torchvision.transforms")


def package() -> Any:
    """Its module, whose random numbers are drawn on the CPU."""
    for name in _NOT_NEEDED:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    has_gpu, torch.cuda.is_available = torch.cuda.is_available, lambda: True  # asserted when it is imported
    try:
        theirs = importlib.import_module("stylegan2_pytorch.stylegan2_pytorch")
    finally:
        torch.cuda.is_available = has_gpu
    theirs.noise = lambda count, width, device: torch.randn(count, width)
    theirs.image_noise = lambda count, side, device: torch.FloatTensor(count, side, side, 1).uniform_(0.0, 1.0)
    return theirs


class Networks(nn.Module):
    """Its networks with its initial weights; of each side as wide as ours with `capacity` * 2 * side as base."""

    def __init__(self, theirs: Any, side: int, capacity: int) -> None:
        super().__init__()
        self.S = theirs.StyleVectorizer(512, 8, lr_mul=0.1)
        self.G = theirs.Generator(side, 512, capacity)
        self.D = theirs.Discriminator(side, capacity // 2)  # of the same capacity it is twice as wide as the generator
        theirs.StyleGAN2._init_weights(self)


def training(
    theirs: Any, networks: Networks, images: Tensor, penalty_every: int, path_every: int
) -> Callable[[int], dict[str, float]]:
    """Its Trainer's step of a number, as it is with default settings; returns losses.

    The gradient penalty, of real and generated images alike, and the path lengths, of the whole batch, are terms of
    the two updates' losses. Both come as often as they are told to, path lengths from the first step on. Adam is fused.
    """
    side, count = networks.G.image_size, len(images)
    judge = theirs.AugWrapper(networks.D, side)
    of_generator = [*networks.G.parameters(), *networks.S.parameters()]
    g_optimizer = torch.optim.Adam(of_generator, lr=2e-4, betas=(0.5, 0.9), fused=True)
    d_optimizer = torch.optim.Adam(networks.D.parameters(), lr=4e-4, betas=(0.5, 0.9), fused=True)
    mean_length: Any = None
    move_on = theirs.EMA(0.99).update_average

    def generated(latents: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        latent = latents(count, networks.G.num_layers, networks.G.latent_dim, device=None)
        noise = theirs.image_noise(count, side, device=None)
        styles = theirs.styles_def_to_tensor(theirs.latent_to_w(networks.S, latent))
        return networks.G(styles, noise), styles

    def step(number: int) -> dict[str, float]:
        nonlocal mean_length
        penalizes, by_path = number % penalty_every == 0, number % path_every == 0
        d_optimizer.zero_grad()
        latents = theirs.mixed_list if random.random() < 0.9 else theirs.noise_list
        fake, _ = generated(latents)
        fake, (fake_logits, _) = judge(
            fake.clone().detach(), return_aug_images=True, input_requires_grad=penalizes, detach=True
        )
        real = images.clone().requires_grad_(penalizes)
        real_logits, _ = judge(real)
        d_loss = theirs.hinge_loss(fake_logits, real_logits)
        total = d_loss
        if penalizes:
            total = d_loss + theirs.gradient_penalty(real, real_logits) + theirs.gradient_penalty(fake, fake_logits)
        total.register_hook(theirs.raise_if_nan)
        total.backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        image, styles = generated(latents)
        logits, _ = judge(image)
        g_loss = theirs.gen_hinge_loss(logits, None)
        total = g_loss
        if by_path:
            lengths = theirs.calc_pl_lengths(styles, image)
            if mean_length is not None:
                total = g_loss + ((lengths - mean_length) ** 2).mean()
        total.register_hook(theirs.raise_if_nan)
        total.backward()
        g_optimizer.step()
        if by_path:
            mean_length = move_on(mean_length, lengths.detach().mean().item())
        return {"d": d_loss.item(), "g": g_loss.item()}

    return step
