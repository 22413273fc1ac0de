"""Tokenizers and their priors on one GPU: ViT VQ-VAEs on images, transformer priors on codes, by attention kernel.

`python benchmarks/gpu.py` prints its table. The tokenizers have the loss of Yu 2022 without the discriminator and with
no perceptual network, whose FLOPs would be others'; the priors predict given codes, so that no tokenizer runs.
"""

import dataclasses

import torch
from torch import Tensor

from gmdist.families.coding import Coding
from gmdist.families.conditioning import ConditioningConfig
from gmdist.families.family import Batch, Family, Surroundings
from gmdist.families.prior import Prior, PriorConfig
from gmdist.families.vit_vqvae import ViTVQVAE, ViTVQVAEConfig
from gmdist.nets import causal_transformer
from gmdist.nets.causal_transformer import CausalTransformer, CausalTransformerConfig
from gmdist.nets.perceptual import PerceptualConfig
from gmdist.nets.quantizer import QuantizerConfig
from gmdist.nets.vit import ViTConfig

CLASSES, SEED = 1000, 0
BASE = ViTConfig(channels=768, depth=12, num_heads=12, hidden_channels=3072)
LARGE = ViTConfig(channels=1280, depth=32, num_heads=16, hidden_channels=5120)


def surroundings(image_side: int) -> Surroundings:
    """Coloured images of a thousand classes."""
    return Surroundings(image_side, 3, CLASSES, SEED, lambda _: None)


@dataclasses.dataclass(frozen=True)
class TokenizerCase:
    """A ViT VQ-VAE with patches of 8 pixels."""

    name: str
    encoder: ViTConfig
    decoder: ViTConfig
    batch_size: int  # at most
    image_side: int = 256  # pixels
    codebook_size: int = 8192
    mfu: float = 0.45  # asked for on an H200
    trains: str = "autoencoder"
    is_causal: bool = False
    channels_last: bool = False

    def family(self) -> Family:
        """With weights as they are drawn."""
        torch.manual_seed(SEED)
        codes = QuantizerConfig(self.codebook_size, 32, normalize=True, learned_by="gradient", kmeans_steps=0)
        config = ViTVQVAEConfig(8, self.encoder, self.decoder, codes, perceptual=PerceptualConfig("none"))
        return ViTVQVAE(config, surroundings(self.image_side))

    def samples(self, count: int) -> dict[str, Tensor]:
        """Images [N, 3, H, W]."""
        return {"image": torch.rand(count, 3, self.image_side, self.image_side) * 2 - 1}

    def head_widths(self) -> list[int]:
        """Of every attention."""
        return sorted({half.attention_channels // half.num_heads for half in (self.encoder, self.decoder)})


@dataclasses.dataclass(frozen=True)
class PriorCase:
    """A transformer prior over grids of codes, under classes."""

    name: str
    config: CausalTransformerConfig
    batch_size: int  # at most
    grid_side: int = 16  # codes
    num_codes: int = 16_384
    image_side: int = 256  # pixels, of which the codes would be with patches of 16
    mfu: float = 0.45  # asked for on an H200
    trains: str = "prior"
    is_causal: bool = True
    channels_last: bool = False

    def family(self) -> Family:
        """With weights as they are drawn."""
        return OnCodes(self)

    def samples(self, count: int) -> dict[str, Tensor]:
        """Codes int64 [N, rows, columns], and a label for each."""
        codes = torch.randint(self.num_codes, (count, self.grid_side, self.grid_side))
        return {"tokens": codes, "label": torch.arange(count) % CLASSES}

    def head_widths(self) -> list[int]:
        """Of every attention."""
        return [self.config.channels // self.config.num_heads]


class Codes(Coding):
    """Codes that are in the batch."""

    cached = ("tokens",)

    def __init__(self, case: PriorCase) -> None:
        super().__init__(surroundings(case.image_side))
        self.shape, self.num_codes = (1, case.grid_side, case.grid_side), case.num_codes

    def of_batch(self, batch: Batch) -> Tensor:
        """Codes int64 [N, 1, rows, columns]."""
        return batch["tokens"][:, None]


class OnCodes(Prior):
    """A transformer prior without its tokenizer."""

    blocks = causal_transformer.BLOCKS
    inputs = ()

    def __init__(self, case: PriorCase) -> None:
        torch.manual_seed(SEED)
        config = PriorConfig(conditioning=ConditioningConfig(kind="class"))
        super().__init__(config, surroundings(case.image_side), Codes(case))
        grid = case.grid_side, case.grid_side
        self.prior = CausalTransformer(case.config, case.num_codes, grid, CLASSES)


CASES: list[TokenizerCase | PriorCase] = [
    TokenizerCase("ViT VQ-VAE base", BASE, BASE, 64),
    TokenizerCase("ViT VQ-VAE large", ViTConfig(), LARGE, 32),
    PriorCase("transformer prior L, 256 codes", CausalTransformerConfig(1024, 24, 16), 128),
    PriorCase("transformer prior XL, 256 codes", CausalTransformerConfig(1280, 36, 20), 128),
]
SMALL_CASES: list[TokenizerCase | PriorCase] = [
    TokenizerCase("small ViT VQ-VAE", ViTConfig(32, 2, 2, 64, 16), ViTConfig(32, 2, 2, 64, 16), 2, 32, 64),
    PriorCase("small transformer prior", CausalTransformerConfig(32, 2, 2), 2, 4, 64, 32),
]
