"""ViT-VQGAN: a tokenizer whose halves are vision transformers (Yu 2022, "Vector-quantized image modeling")."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist.checks import nonnegative
from gmdist.families.adversarial import DiscriminatorConfig, ReconstructionFamily
from gmdist.families.codes import CodedAutoencoder, start_problem
from gmdist.families.family import Batch, Metrics, Surroundings
from gmdist.nets import stylegan2_discriminator, vit
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.perceptual import PerceptualConfig
from gmdist.nets.quantizer import Quantizer, QuantizerConfig
from gmdist.nets.vit import ViTConfig, ViTDecoder, ViTEncoder

_MARGIN = 0.1  # of the pixels' range, at both ends, that no logit is infinite (Ramesh 2021, App. A.3)


@dataclass
class ViTVQVAEConfig:
    """Sizes and loss; the defaults are the small model's, and the weights of Yu 2022, Sec. 3.3."""

    patch_size: int = 8  # pixels a side
    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: ViTConfig = field(default_factory=ViTConfig)
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig(8192, 32, normalize=True, learned_by="gradient", kmeans_steps=0)
    )
    logit_laplace_weight: float = 0.1  # of the negative log-likelihood, a mean over pixels and channels
    l2_weight: float = 1.0  # of the squared error, a mean as well
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(weight=0.1))
    discriminator: DiscriminatorConfig | None = None  # None: no adversarial loss

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if self.patch_size < 1 or image_size % self.patch_size:
            return f"patch_size: {self.patch_size}; must divide data.image_size, {image_size}"
        for key in ("encoder", "decoder", "quantizer"):
            if problem := getattr(self, key).problem():
                return f"{key}.{problem}"
        if problem := start_problem(self.quantizer, (image_size // self.patch_size) ** 2):
            return f"quantizer.{problem}"
        if problem := nonnegative(logit_laplace_weight=self.logit_laplace_weight, l2_weight=self.l2_weight):
            return problem
        if problem := self.perceptual.problem(image_size):
            return f"perceptual.{problem}"
        perceptual_weight = 0.0 if self.perceptual.name == "none" else self.perceptual.weight
        if not any((self.l2_weight, self.logit_laplace_weight, perceptual_weight)):
            return (
                f"l2_weight: {self.l2_weight}; must be above 0, or logit_laplace_weight or that of a perceptual "
                "distance: nothing would draw reconstructions to images"
            )
        if self.discriminator is not None and (problem := self.discriminator.problem(image_size)):
            return f"discriminator.{problem}"
        return None


class ViTVQVAE(ReconstructionFamily, CodedAutoencoder):
    """Encoder, codebook, decoder; a code for each patch.

    The decoder gives logits, of which x' are the pixels. The loss of a sample is (Yu 2022, Sec. 3.3)

        l MSE(x', x) + m logit-Laplace(x) + w d(x', x) - a logit(x') + commitment_weight MSE(z, sg[e]) + MSE(sg[z], e)

    with d the perceptual distance, z the encoder's projected features, e the codes nearest to them, and the logit of
    the discriminator; `discriminator` says when a begins and how it grows.
    """

    blocks = (*vit.BLOCKS, *stylegan2_discriminator.BLOCKS)
    autoencoder: nn.ModuleDict

    def __init__(self, config: ViTVQVAEConfig, surroundings: Surroundings) -> None:
        side = surroundings.image_size // config.patch_size
        shape = surroundings.image_channels, config.patch_size, side
        quantizer = Quantizer(config.quantizer, config.encoder.channels, config.decoder.channels)
        halves = {
            "encoder": ViTEncoder(config.encoder, *shape),
            "quantizer": quantizer,
            "decoder": ViTDecoder(config.decoder, *shape),
        }
        super().__init__(nn.ModuleDict(halves), config.perceptual, config.discriminator, surroundings)
        self.config, self.codebook_size, self.token_shape = config, config.quantizer.codebook_size, (side, side)

    @property
    def last_layer(self) -> Tensor:
        decoder = self.autoencoder["decoder"]
        assert isinstance(decoder, ViTDecoder)
        return decoder.pixels.weight

    @torch.no_grad()
    def initialize(self, batch: Batch) -> None:
        """Read the perceptual network, and begin the codebook with k-means where that is asked for."""
        super().initialize(batch)
        self.start_codebook(batch)

    def reconstruction(self, batch: Batch) -> Tensor:
        """From the codes, unbounded."""
        return self.decoded(self.quantizer.quantize(self.features(batch["image"])).features)

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """Errors of what the nearest codes give, what draws features and codes together, and the adversarial term."""
        image, found = batch["image"], self.quantized(batch, seen)
        logits = self._logits(found.features)
        reconstruction = pixels(logits)
        parts = {
            "l2": (self.config.l2_weight, (reconstruction - image).square().mean()),
            "logit_laplace": (self.config.logit_laplace_weight, logit_laplace(logits, image).mean()),
        }
        if self.perceptual is not None:
            parts["perceptual"] = self.config.perceptual.weight, self.perceptual(reconstruction, image).mean()
        error = torch.stack([weight * part for weight, part in parts.values()]).sum()
        metrics = {name: part.detach() for name, (_, part) in parts.items()} | {"commitment": found.commitment}
        loss = error + found.loss
        if term := self.adversarial_loss(reconstruction, error, seen):
            adversarial, logged = term
            loss, metrics = loss + adversarial, metrics | logged
        return loss, metrics | {"loss": loss.detach()}

    def features(self, image: Tensor) -> Tensor:
        return self.autoencoder["encoder"](image).unflatten(1, self.token_shape)

    def decoded(self, features: Tensor) -> Tensor:
        return pixels(self._logits(features))

    def compared_with(self, image: Tensor, reconstruction: Tensor) -> Metrics:
        """The perceptual distance too, where there is one."""
        metrics = super().compared_with(image, reconstruction)
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image).mean()
        return metrics

    def _logits(self, features: Tensor) -> Tensor:
        """The decoder's output [N, C, H, W], at least fp32, for features [N, h, w, C]."""
        return at_least_fp32(self.autoencoder["decoder"](features.flatten(1, 2)))


def pixels(logits: Tensor) -> Tensor:
    """Images around [-1, 1] whose logits these are: they reach 0.25 beyond."""
    return (2.0 * torch.sigmoid(logits) - 1.0) / (1.0 - 2.0 * _MARGIN)


def logit_laplace(logits: Tensor, image: Tensor) -> Tensor:
    """The negative log-likelihood of pixels in [-1, 1] whose logits are Laplace distributed, in nats, elementwise.

    -log p(y) = |logit(y) - mu| + log(2 y (1 - y)) with y the pixel moved into [0.1, 0.9] and mu the decoder's logit
    (Ramesh 2021, Eq. 2), of scale 1: Yu 2022 weighs the term instead, and its decoder gives no scale.
    """
    y = 0.5 + (0.5 - _MARGIN) * image
    return (torch.logit(y) - logits).abs() + torch.log(2.0 * y * (1.0 - y))
