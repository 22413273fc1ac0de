"""The vector quantized autoencoder: a convolutional tokenizer (van den Oord 2017)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmdist.errors import DataError
from gmdist.families.codes import CodedAutoencoder, start_problem
from gmdist.families.family import Batch, Metrics, Phase, Surroundings
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.convolutional import BLOCKS, ConvolutionalConfig, ConvolutionalDecoder, ConvolutionalEncoder
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
        num_tokens = (image_size // self.network.downsampling) ** 2
        if problem := self.quantizer.problem() or start_problem(self.quantizer, num_tokens):
            return f"quantizer.{problem}"
        return None


class VQVAE(CodedAutoencoder):
    """Encoder, codebook, decoder.

    The loss of a sample is that of DeepMind's published example (van den Oord 2017, Eq. 3 and App. A.1):

        MSE(x', x) / var(x)  +  commitment_weight MSE(z, sg[e])  +  MSE(sg[z], e)

    with the variance of all pixels of the first samples, z the encoder's features and e the codes nearest to them.
    Codes that are moving averages go without the last term.
    """

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

    @torch.no_grad()
    def initialize(self, batch: Batch) -> None:
        """Measure the images' variance, and begin the codebook with k-means of the encoder's features."""
        self.image_variance.copy_(batch["image"].double().var(correction=0))
        if not self.image_variance > 0.0:
            raise DataError(f"the first {len(batch['key'])} images have one color, and nothing can be learned of them")
        self.start_codebook(batch)

    def phases(self) -> list[Phase]:
        """One update of encoder and decoder."""
        return [Phase("autoencoder", "autoencoder", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The reconstruction from the nearest codes, and what draws features and codes to each other."""
        image, found = batch["image"], self.quantized(batch, seen)
        mse = (self.decoded(found.features) - image).square().mean()
        loss = mse / self.image_variance + found.loss
        return loss, {"loss": loss.detach(), "mse": mse.detach(), "commitment": found.commitment}

    def features(self, image: Tensor) -> Tensor:
        return self.autoencoder["encoder"](image).movedim(1, -1)

    def decoded(self, features: Tensor) -> Tensor:
        return at_least_fp32(self.autoencoder["decoder"](features.movedim(-1, 1)))
