"""ViT-VQGAN: a tokenizer whose halves are vision transformers (Yu 2022, "Vector-quantized image modeling")."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.families.adversarial import DiscriminatorConfig, JudgedAutoencoder
from gmdist.families.codes import (
    check_finite,
    observe,
    start_codebook,
    token_shares,
    update_codebook,
)
from gmdist.families.family import Batch, Condition, Metrics, Surroundings
from gmdist.families.tokenizer import Tokenizer
from gmdist.nets import stylegan2_discriminator, vit
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.finite import watched
from gmdist.nets.image_quality import psnr, ssim
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
    logit_laplace_weight: float = 0.1
    l2_weight: float = 1.0
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(weight=0.1))
    discriminator: DiscriminatorConfig | None = None  # None: no adversarial loss

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if self.patch_size < 1 or image_size % self.patch_size:
            return f"patch_size: {self.patch_size}; must divide data.image_size, {image_size}"
        for key in ("encoder", "decoder", "quantizer"):
            if problem := getattr(self, key).problem():
                return f"{key}.{problem}"
        for key in ("logit_laplace_weight", "l2_weight"):
            if not 0.0 <= getattr(self, key) < math.inf:
                return f"{key}: {getattr(self, key)}; must be a number of at least 0"
        if problem := self.perceptual.problem(image_size):
            return f"perceptual.{problem}"
        if self.discriminator is not None and (problem := self.discriminator.problem(image_size)):
            return f"discriminator.{problem}"
        return None


class ViTVQVAE(JudgedAutoencoder, Tokenizer):
    """Encoder, codebook, decoder; a code for each patch.

    The decoder gives logits, of which x' are the pixels. The loss of a sample is (Yu 2022, Sec. 3.3)

        l MSE(x', x) + m logit-Laplace(x) + w d(x', x) + commitment_weight MSE(z, sg[e]) + MSE(sg[z], e) - a judged(x')

    with d the perceptual distance, z the encoder's projected features and e the codes nearest to them; `discriminator`
    says when a begins and how it grows.
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
    def quantizer(self) -> Quantizer:
        """The codebook between its projections."""
        quantizer = self.autoencoder["quantizer"]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @property
    def last_layer(self) -> Tensor:
        decoder = self.autoencoder["decoder"]
        assert isinstance(decoder, ViTDecoder)
        return decoder.pixels.weight

    @torch.no_grad()
    def initialize(self, batch: Batch) -> None:
        """Read the perceptual network, and begin the codebook with k-means where that is asked for."""
        super().initialize(batch)
        if self.config.quantizer.kmeans_steps:
            start_codebook(self.quantizer, self._checked_features(batch["image"]), batch["key"], self.seed)

    def reconstruction(self, batch: Batch) -> Tensor:
        """From the codes, unbounded."""
        return pixels(self._logits(self.quantizer.quantize(self.autoencoder["encoder"](batch["image"])).features))

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The reconstruction from the nearest codes, what draws features and codes together, and the judgement."""
        image = batch["image"]
        found = self.quantizer.quantize(self.autoencoder["encoder"](image))
        observe(self.quantizer, found, batch, self.seed, seen)
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
        if judgement := self.judgement(reconstruction, error, seen):
            adversarial, judged = judgement
            loss, metrics = loss + adversarial, metrics | judged
        return loss, metrics | {"loss": loss.detach()}

    def after_step(self, seen: int) -> Metrics:
        """The codebook's statistics move on."""
        return update_codebook(self.quantizer)

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode codes that are drawn evenly, each alone. It is not made for this: its prior is a second run."""
        return self.decode(rng.integers(self.seed, "sample", keys, self.codebook_size, self.token_shape))

    def tokens(self, image: Tensor) -> Tensor:
        return self.quantizer.tokens(self._checked_features(image)).unflatten(1, self.token_shape)

    def decode(self, tokens: Tensor) -> Tensor:
        return pixels(self._logits(self.quantizer.lookup(tokens.flatten(1)))).clamp(-1.0, 1.0)

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions against images: means over images; and the share of each code."""
        image, tokens = batch["image"], self.tokens(batch["image"])
        reconstruction = self.decode(tokens)
        metrics = {
            "psnr_db": psnr(reconstruction, image).mean(),
            "ssim": ssim(reconstruction, image).mean(),
            "mse": (reconstruction - image).square().mean(),
            "shares": token_shares(tokens, self.codebook_size),
        }
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, image).mean()
        return metrics

    def _checked_features(self, image: Tensor) -> Tensor:
        """The encoder's features [N, L, C]; DivergedError names the first layer that gives what is not finite."""
        with watched(self.autoencoder["encoder"]) as watch:
            features = self.autoencoder["encoder"](image)
        check_finite(watch, "encoder.")
        return features

    def _logits(self, features: Tensor) -> Tensor:
        """The decoder's output [N, C, H, W], at least fp32, for features [N, L, C]."""
        return at_least_fp32(self.autoencoder["decoder"](features))


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
