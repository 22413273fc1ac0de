"""StyleGAN2 (Karras 2020, "Analyzing and improving the image quality of StyleGAN"), with adaptive augmentation."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmdist import rng
from gmdist.checks import at_least, between, nonnegative
from gmdist.errors import ConfigError
from gmdist.families.family import Batch, Condition, Metrics, Phase, Surroundings, conditioned_labels
from gmdist.families.gan import GAN, GANConfig, ObjectiveConfig
from gmdist.families.stylegan2_presets import preset_settings
from gmdist.interchange.stylegan2 import initial_problem, initial_states
from gmdist.nets import stylegan2_discriminator, stylegan2_generator
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.equalized import whole_precision
from gmdist.nets.stylegan2_discriminator import StyleGAN2Discriminator, StyleGAN2DiscriminatorConfig
from gmdist.nets.stylegan2_generator import StyleGAN2Generator, StyleGAN2GeneratorConfig
from gmdist.workers import all_sum

_STYLE_DECAY = 0.995  # of the mean style, at each step


@dataclass
class PathLengthConfig:
    """The regularisation of the generator (Karras 2020, Sec. 3.2)."""

    weight: float = 2.0  # 0: none
    every: int = 4  # steps
    decay: float = 0.01  # of the mean length: the share that a step brings
    batch_shrink: int = 2  # it is measured on the first of so many parts of each micro-batch

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := nonnegative(weight=self.weight) or at_least(1, every=self.every, batch_shrink=self.batch_shrink):
            return problem
        if not 0.0 < self.decay <= 1.0:
            return f"decay: {self.decay}; must be above 0 and at most 1"
        return None


@dataclass
class StyleGAN2Config(GANConfig):
    """Sizes, regularisation, truncation."""

    preset: str | None = None  # of PRESETS: sets sizes, batch, rates and averages where the config does not; None: none
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(r1_gamma=10.0, penalty_every=16))
    generator: StyleGAN2GeneratorConfig = field(default_factory=StyleGAN2GeneratorConfig)
    discriminator: StyleGAN2DiscriminatorConfig = field(default_factory=StyleGAN2DiscriminatorConfig)
    path_length: PathLengthConfig = field(default_factory=PathLengthConfig)
    style_mixing: float = 0.9  # share of images whose finer layers have another latent's style
    truncation: float = 1.0  # of samples: styles are drawn so far from their mean, 0 to 1; 1: as they are
    conditional: bool | None = None  # told classes; None: where the data has some
    # Networks in the names of StyleGAN2-ADA's authors, on every worker's machine: a folder with generator.safetensors
    # and discriminator.safetensors, or a generator's file, and the discriminator starts anew. Read when the run starts;
    # from then on the weights are in its checkpoints.
    init_from: str | None = field(default=None, metadata={"location": True})

    preset_settings = staticmethod(preset_settings)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        for key in ("generator", "discriminator"):
            if problem := getattr(self, key).problem(image_size):
                return f"{key}.{problem}"
        if problem := self.path_length.problem():
            return f"path_length.{problem}"
        return (
            between(0, 1, style_mixing=self.style_mixing, truncation=self.truncation)
            or super().problem(image_size)
            or initial_problem(self.init_from)
        )


class StyleGAN2(GAN):
    """Generator with styles and noise; R1 and path lengths are lazy phases."""

    blocks = (*stylegan2_generator.BLOCKS, *stylegan2_discriminator.BLOCKS)

    generator: StyleGAN2Generator
    discriminator: StyleGAN2Discriminator
    style_sum: Tensor
    mean_length: Tensor
    length_sum: Tensor

    def __init__(self, config: StyleGAN2Config, surroundings: Surroundings) -> None:
        classes = surroundings.num_classes if config.conditional is not False else 0
        if config.conditional and not classes:
            raise ConfigError("family.conditional: true; needs data with labels: set data.num_classes")
        shape = surroundings.image_size, surroundings.image_channels, classes
        generator = StyleGAN2Generator(config.generator, *shape)
        discriminator = StyleGAN2Discriminator(config.discriminator, *shape)
        super().__init__(config, generator, discriminator, config.generator.latent_channels, surroundings, classes)
        # Path lengths are of the first images of a micro-batch: of the same ones however a batch is cut, if it divides.
        parts = config.path_length.batch_shrink if config.path_length.weight else 1
        self.compared = math.lcm(max(config.discriminator.minibatch_std_group, 1), parts)
        self.path_length, self.style_mixing, self.truncation = (
            config.path_length,
            config.style_mixing,
            config.truncation,
        )
        self.init_from = config.init_from
        width = config.generator.style_channels
        self.register_buffer("style_sum", torch.zeros(width + 1))  # of this step's styles, and their number
        self.register_buffer("mean_length", torch.zeros(()))
        self.register_buffer("length_sum", torch.zeros(2))  # of this step's path lengths, and their number

    def initialize(self, batch: Batch) -> None:
        """Read the networks' first weights, where they are another's."""
        if self.init_from is not None:
            for child, state in initial_states(self.init_from, self.generator, self.discriminator).items():
                self.get_submodule(child).load_state_dict(state)

    def check_files(self) -> None:
        """Compare them with the run's networks."""
        if self.init_from is not None:
            initial_states(self.init_from, self.generator, self.discriminator)

    def phases(self) -> list[Phase]:
        """Each network, then its regularisation."""
        phases = {phase.name: phase for phase in super().phases()}
        generator = [phases.pop("g")]
        if self.path_length.weight:
            generator.append(
                Phase("g_pl", "generator", self.path_length_loss, self.path_length.every, higher_order=True)
            )
        return [*generator, *phases.values()]

    def generate(self, keys: Tensor, label: Tensor | None, purpose: str) -> Tensor:
        """Images of mixed styles and fresh noise."""
        styles = self._mixed_styles(keys, label, purpose)
        if purpose == "g":
            with torch.no_grad():
                firsts = styles[:, 0]
                self.style_sum += torch.cat([firsts.sum(dim=0), firsts.new_full((1,), len(firsts))])
        return self.generator.synthesis(styles, self._noise(keys, purpose))

    def path_length_loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """That a step of styles moves images equally far, in whatever direction (Karras 2020, Eq. 4).

        The length to keep to is the mean before this step, which does not depend on how a batch is cut.
        """
        keys, label = batch["key"], self._label(batch)
        count = -(-len(keys) // self.path_length.batch_shrink)
        keys, label = keys[:count], None if label is None else label[:count]
        styles = self._mixed_styles(keys, label, "path_length")
        image = at_least_fp32(self.generator.synthesis(styles, self._noise(keys, "path_length")))
        lengths = path_lengths(image, styles, rng.normal(self.seed, "path_length/image", keys, image.shape[1:]))
        with torch.no_grad():
            self.length_sum += torch.stack([lengths.sum(), lengths.new_full((), count)])
        # The pixels themselves count nothing, and let a gradient of zero reach every parameter, as ZeRO asks.
        penalty = (lengths - self.mean_length).square().mean()
        loss = self.path_length.weight * penalty + 0.0 * image.mean()
        return loss, {"loss": loss.detach(), "length": lengths.detach().mean()}

    def after_step(self, seen: int) -> Metrics:
        """The mean style, the mean path length and the augmentation's strength move on."""
        styles = all_sum(self.style_sum)
        self.generator.mean_style.lerp_(styles[:-1] / styles[-1], 1.0 - _STYLE_DECAY)
        self.style_sum.zero_()
        lengths = all_sum(self.length_sum)
        moved = self.mean_length.lerp(lengths[0] / lengths[1].clamp(min=1.0), self.path_length.decay)
        self.mean_length.copy_(torch.where(lengths[1] > 0.0, moved, self.mean_length))
        self.length_sum.zero_()
        return super().after_step(seen)

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        return self._synthesized(self.drawn_latents(keys, condition), self._noise(keys, "sample"))

    def drawn_latents(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Styles [N, W], truncated (Karras 2019, App. B)."""
        label = conditioned_labels(keys, condition, self.num_classes)
        latent = rng.normal(self.seed, "latent/sample", keys, (self.latent_channels,))
        return torch.lerp(self.generator.mean_style, self.generator.mapping(latent, label), self.truncation)

    def from_latents(self, latents: Tensor) -> Tensor:
        """With the noise that comes with the network: on a way through styles, nothing else changes."""
        return self._synthesized(latents, None)

    def between(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        return torch.lerp(one, other, share)

    def mixed(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The first half of the layers has the one's style, the second the other's."""
        num_styles = self.generator.synthesis.num_styles
        is_fine = torch.arange(num_styles, device=fine.device)[:, None] >= num_styles // 2
        return self._synthesized(torch.where(is_fine, fine[:, None], coarse[:, None]), None)

    def _synthesized(self, styles: Tensor, noise: list[Tensor] | None) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of styles [N, W], or of one for each layer [N, L, W]."""
        if styles.ndim == 2:
            styles = styles[:, None].expand(-1, self.generator.synthesis.num_styles, -1)
        return self.generator.synthesis(styles, noise).clamp(-1.0, 1.0)

    def _mixed_styles(self, keys: Tensor, label: Tensor | None, purpose: str) -> Tensor:
        """Styles [N, L, W]: from a random layer on, most images have another latent's (Karras 2019, Sec. 3.1)."""
        num_styles = self.generator.synthesis.num_styles
        num_latents = 2 if self.style_mixing else 1
        latents = rng.normal(self.seed, f"latent/{purpose}", keys, (num_latents, self.latent_channels))
        style = self.generator.mapping(latents[:, 0], label)[:, None].expand(-1, num_styles, -1)
        if not self.style_mixing:
            return style
        other = self.generator.mapping(latents[:, 1], label)[:, None]
        first = 1 + rng.integers(self.seed, f"mixing/{purpose}/layer", keys, num_styles - 1)
        mixes = rng.uniform(self.seed, f"mixing/{purpose}", keys) < self.style_mixing
        first = torch.where(mixes, first, num_styles)
        return torch.where((torch.arange(num_styles, device=keys.device) < first[:, None])[:, :, None], style, other)

    def _noise(self, keys: Tensor, purpose: str) -> list[Tensor]:
        """For each layer [N, 1, H, W]."""
        sides = self.generator.synthesis.noise_sides
        noise = rng.normal(self.seed, f"noise/{purpose}", keys, (sum(side * side for side in sides),))
        parts = noise.split([side * side for side in sides], dim=1)
        return [part.view(-1, 1, side, side) for part, side in zip(parts, sides, strict=True)]


def path_lengths(image: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """How far a small step of each style moves an image, in a random direction of pixels (Karras 2020, Sec. 3.2).

    Args:
        image: [N, C, H, W], of `styles`.
        styles: [N, L, W].
        noise: standard normal, as `image`.

    Returns:
        [N], which can be differentiated in turn.
    """
    direction = noise / math.sqrt(image.shape[2] * image.shape[3])
    with whole_precision(image, wanted=True):  # autocast would reach the derivatives of what is fp32, too
        (gradient,) = torch.autograd.grad((image * direction).sum(), styles, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
