"""A convolutional autoencoder with a vector between its halves."""

import torch
from torch import Tensor, nn

from gmdist.checks import between
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.convolutional import ConvolutionalConfig, ConvolutionalDecoder, ConvolutionalEncoder

_MAX_LATENT_DIM = 1 << 14


class VectorEncoder(nn.Sequential):
    """Images [N, C, S, S] -> vectors [N, D]."""

    def __init__(self, config: ConvolutionalConfig, image_size: int, image_channels: int, out_dim: int) -> None:
        width, side = config.channels[-1], image_size // config.downsampling
        convolutions = ConvolutionalEncoder(config, image_channels, width)
        super().__init__(convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(width * side**2, out_dim))


class VectorDecoder(nn.Sequential):
    """Vectors [N, D] -> images [N, C, S, S], unbounded."""

    def __init__(self, config: ConvolutionalConfig, image_size: int, image_channels: int, in_dim: int) -> None:
        width, side = config.channels[-1], image_size // config.downsampling
        convolutions = ConvolutionalDecoder(config, width, image_channels)
        grid = nn.Unflatten(1, (width, side, side))
        super().__init__(nn.Linear(in_dim, width * side**2), grid, nn.ReLU(), convolutions)


class VectorAutoencoder(nn.Module):
    """Encoder and decoder in one network, so that one optimizer trains both.

    `log_scale`, where it is learned, is that of the reconstruction's likelihood. It is [1], as ZeRO stage 3 cannot
    share out a scalar.
    """

    def __init__(
        self,
        config: ConvolutionalConfig,
        image_size: int,
        image_channels: int,
        *,
        encoded_dim: int,
        latent_dim: int,
        log_scale: float | None = None,
    ) -> None:
        """Build both halves.

        Args:
            config: their sizes.
            image_size, image_channels: S and C.
            encoded_dim: numbers that the encoder gives for an image: a latent, or a mean and a log-variance.
            latent_dim: numbers that the decoder takes.
            log_scale: where the learned one starts; None: there is none.
        """
        super().__init__()
        self.encoder = VectorEncoder(config, image_size, image_channels, encoded_dim)
        self.decoder = VectorDecoder(config, image_size, image_channels, latent_dim)
        self.log_scale = None if log_scale is None else nn.Parameter(torch.full((1,), log_scale))

    def encode(self, image: Tensor) -> Tensor:
        """Images [N, C, S, S] in [-1, 1] -> [N, encoded_dim], at least fp32."""
        return at_least_fp32(self.encoder(image))

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [N, latent_dim] -> [N, C, S, S], unbounded, at least fp32."""
        return at_least_fp32(self.decoder(latent))


def latent_dim_problem(latent_dim: int) -> str | None:
    """Why a vector of this size cannot be, as "key: value; what is valid"; None if it can."""
    return between(1, _MAX_LATENT_DIM, latent_dim=latent_dim)
