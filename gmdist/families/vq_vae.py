"""The vector quantized autoencoder: a convolutional tokenizer (van den Oord 2017)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.errors import DataError
from gmdist.families.codes import (
    check_finite,
    observe,
    start_codebook,
    token_shares,
    update_codebook,
)
from gmdist.families.family import Batch, Condition, Metrics, Phase, Surroundings
from gmdist.families.tokenizer import Tokenizer
from gmdist.nets.convolutional import BLOCKS, ConvolutionalConfig, ConvolutionalDecoder, ConvolutionalEncoder
from gmdist.nets.finite import watched
from gmdist.nets.image_quality import psnr, ssim
from gmdist.nets.quantizer import Quantizer, QuantizerConfig


@dataclass
class VQVAEConfig:
    """Sizes of the autoencoder and its codebook."""

    network: ConvolutionalConfig = field(default_factory=ConvolutionalConfig)
    feature_channels: int = 64  # that the encoder gives and the decoder takes
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.network.problem(image_size):
            return f"network.{problem}"
        if not 1 <= self.feature_channels <= 1 << 16:
            return f"feature_channels: {self.feature_channels}; must be from 1 to {1 << 16}"
        if problem := self.quantizer.problem():
            return f"quantizer.{problem}"
        return None


class VQVAE(Tokenizer):
    """Encoder, codebook, decoder.

    The loss of a sample is that of DeepMind's published example (van den Oord 2017, Eq. 3 and App. A.1):

        MSE(x', x) / var(x)  +  commitment_weight MSE(z, sg[e])  +  MSE(sg[z], e)

    with the variance of all pixels of the first samples, z the encoder's features and e the codes nearest to them.
    Codes that are moving averages go without the last term.
    """

    averaged = ("autoencoder",)
    blocks = BLOCKS

    image_variance: Tensor

    def __init__(self, config: VQVAEConfig, surroundings: Surroundings) -> None:
        super().__init__()
        self.config, self.seed = config, surroundings.seed
        self.image_size, self.image_channels = surroundings.image_size, surroundings.image_channels
        self.codebook_size = config.quantizer.codebook_size
        side = surroundings.image_size // config.network.downsampling
        self.token_shape = (side, side)
        channels = surroundings.image_channels
        self.autoencoder = nn.ModuleDict(
            {
                "encoder": ConvolutionalEncoder(config.network, channels, config.feature_channels),
                "quantizer": Quantizer(config.quantizer, config.feature_channels),
                "decoder": ConvolutionalDecoder(config.network, config.feature_channels, channels),
            }
        )
        self.register_buffer("image_variance", torch.ones(()))

    @property
    def quantizer(self) -> Quantizer:
        """The codebook between its projections."""
        quantizer = self.autoencoder["quantizer"]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @torch.no_grad()
    def initialize(self, batch: Batch) -> None:
        """Measure the images' variance, and begin the codebook with k-means of the encoder's features."""
        self.image_variance.copy_(batch["image"].double().var(correction=0))
        if not self.image_variance > 0.0:
            raise DataError(f"the first {len(batch['key'])} images have one color, and nothing can be learned of them")
        if self.config.quantizer.kmeans_steps:
            start_codebook(self.quantizer, self._checked_features(batch["image"]), batch["key"], self.seed)

    def phases(self) -> list[Phase]:
        """One."""
        return [Phase("autoencoder", "autoencoder", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The reconstruction from the nearest codes, and what draws features and codes to each other."""
        image = batch["image"]
        found = self.quantizer.quantize(self._features(image))
        observe(self.quantizer, found, batch, self.seed, seen)
        mse = (self._decoded(found.features) - image).square().mean()
        loss = mse / self.image_variance + found.loss
        return loss, {"loss": loss.detach(), "mse": mse.detach(), "commitment": found.commitment}

    def after_step(self, seen: int) -> Metrics:
        """The codebook's averages move on, and dead codes are revived."""
        return update_codebook(self.quantizer)

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode codes that are drawn evenly, each alone. It is not made for this: its prior is a second run."""
        tokens = rng.integers(self.seed, "sample", keys, self.codebook_size, self.token_shape)
        return self.decode(tokens)

    def tokens(self, image: Tensor) -> Tensor:
        return self.quantizer.tokens(self._checked_features(image))

    def decode(self, tokens: Tensor) -> Tensor:
        return self._decoded(self.quantizer.lookup(tokens)).clamp(-1.0, 1.0)

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions against images: means over images; and the share of each code."""
        image, tokens = batch["image"], self.tokens(batch["image"])
        reconstruction = self.decode(tokens)
        return {
            "psnr_db": psnr(reconstruction, image).mean(),
            "ssim": ssim(reconstruction, image).mean(),
            "mse": (reconstruction - image).square().mean(),
            "shares": token_shares(tokens, self.codebook_size),
        }

    def _features(self, image: Tensor) -> Tensor:
        """What is quantized of images [N, C, H, W]: [N, h, w, Z]."""
        return self.autoencoder["encoder"](image).movedim(1, -1)

    def _checked_features(self, image: Tensor) -> Tensor:
        """The same; DivergedError names the first layer that gives what is not finite."""
        with watched(self.autoencoder["encoder"]) as watch:
            features = self._features(image)
        check_finite(watch, "encoder.")
        return features

    def _decoded(self, features: Tensor) -> Tensor:
        """Images [N, C, H, W], unbounded, of features [N, h, w, Z]."""
        return self.autoencoder["decoder"](features.movedim(-1, 1))
