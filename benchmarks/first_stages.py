"""An update of an autoencoder and of its discriminator: ours, and as diffusers' train_autoencoderkl.py makes it.

Before the discriminator takes part, that script asks it all the same, takes the gradients that weigh its judgement, and
goes back through it. Afterwards a step updates the autoencoder and the next one the discriminator, whose loss goes back
through the autoencoder. The peer tuned is the same losses without what is not needed: no discriminator before its time,
no gradients of its weights while the autoencoder is updated, and none of the autoencoder's while the discriminator is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist import rng
from gmdist.families.adversarial import DiscriminatorConfig
from gmdist.families.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from gmdist.families.family import Surroundings
from gmdist.nets.perceptual import PerceptualConfig

SEED, SIDE, CLIP_NORM, SMALL = 0, 64, 1.0, 1e-4
AdamW = Callable[[nn.Module], torch.optim.Optimizer]


def family_of(sizes: Any, state: dict[str, Tensor], starts: bool) -> AutoencoderKL:
    """Ours with the weights of both networks; `starts`: the discriminator takes part at once, or in no step here.

    No perceptual distance: the script computes its own without gradients.
    """
    judge = DiscriminatorConfig(start_images=0 if starts else 1 << 40)
    config = AutoencoderKLConfig(sizes, learned_logvar=False, perceptual=PerceptualConfig("none"), discriminator=judge)
    torch.manual_seed(SEED)
    family = AutoencoderKL(config, Surroundings(SIDE, 3, 0, SEED, open_run=lambda _: family))
    family.autoencoder.load_state_dict(state)
    return family.train()


def our_step(family: AutoencoderKL, batch: dict[str, Tensor], adamw: AdamW, precision: str) -> Callable[[], float]:
    """An update of each network; returns the autoencoder's loss."""
    optimizers = {phase.name: adamw(family.get_submodule(phase.trains)) for phase in family.phases()}

    def step() -> float:
        losses = []
        for phase in family.phases():
            if not phase.is_due(0, 0):
                continue
            for name, child in family.named_children():
                child.requires_grad_(name == phase.trains)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = phase.loss(batch, 0)
            _update(loss, family.get_submodule(phase.trains), optimizers[phase.name])
            losses.append(loss.item())
        return losses[0]

    return step


def their_step(
    network: Any, judge: nn.Module, batch: dict[str, Tensor], adamw: AdamW, precision: str, starts: bool, tuned: bool
) -> Callable[[], float]:
    """An update of each network after the discriminator's start, of the autoencoder before; returns its loss.

    The discriminator is ours, which has the layers of taming-transformers' that the script takes, and another norm.
    """
    optimizer, of_judge = adamw(network), adamw(judge)
    image = batch["image"]
    with torch.no_grad():
        latents = network.encode(image).latent_dist.mean
    noise = rng.normal(SEED, "posterior", batch["key"], latents.shape[1:])

    def reconstruct() -> tuple[Any, Tensor]:
        posterior = network.encode(image).latent_dist
        return posterior, network.decode(posterior.mean + posterior.std * noise).sample

    def autoencoder_loss() -> Tensor:
        posterior, reconstruction = reconstruct()
        nll = (reconstruction.float() - image).abs().sum() / len(image)
        loss = nll + AutoencoderKLConfig.kl_weight * posterior.kl().float().mean()
        if tuned and not starts:
            return loss
        adversarial = -judge(reconstruction).float().mean()
        last = network.decoder.conv_out.weight
        of_nll, of_adversarial = (torch.autograd.grad(of, last, retain_graph=True)[0] for of in (nll, adversarial))
        weight = (of_nll.norm() / (of_adversarial.norm() + SMALL)).clamp(0.0, 1e4).detach()
        return loss + weight * DiscriminatorConfig.weight * float(starts) * adversarial

    def judge_loss() -> Tensor:
        with torch.set_grad_enabled(not tuned):
            _, reconstruction = reconstruct()
        real, fake = judge(image).float(), judge(reconstruction).float()
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())

    def step() -> float:
        judge.requires_grad_(not tuned)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = autoencoder_loss()
        _update(loss, network, optimizer)
        if starts:
            judge.requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                of_images = judge_loss()
            _update(of_images, judge, of_judge)
        return loss.item()

    return step


def _update(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
