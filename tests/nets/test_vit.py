"""The vision transformer of ViT-VQGAN: counts, patches in their places, attention by hand."""

import pytest
import torch

from gmdist.nets.vit import ViTBlock, ViTConfig, ViTDecoder, ViTEncoder

SMALL, BASE = ViTConfig(), ViTConfig(768, 12, 12, 3072)
LARGE = ViTConfig(1280, 32, 16, 5120)
TINY = ViTConfig(16, 2, 2, 24, 6)


@pytest.mark.parametrize(
    ("encoder", "decoder", "published"),
    # github.com/thuanz123/enhancing-transformers, its three configs, counted without the frozen position embeddings
    [(SMALL, SMALL, 50_908_195), (BASE, BASE, 170_664_483), (SMALL, LARGE, 613_487_907)],
)
def test_as_many_parameters_as_published(encoder: ViTConfig, decoder: ViTConfig, published: int) -> None:
    codes, width = 8192, 32
    with torch.device("meta"):
        halves = ViTEncoder(encoder, 3, 8, 32), ViTDecoder(decoder, 3, 8, 32)
    count = sum(parameter.numel() for half in halves for parameter in half.parameters())
    projections = (encoder.channels + 1) * width + (width + 1) * decoder.channels
    assert count + projections + codes * width == published


def test_tokens_stand_for_their_patches() -> None:
    torch.manual_seed(0)
    encoder, image = ViTEncoder(TINY, 3, 4, 3), torch.randn(1, 3, 12, 12)
    encoder.blocks = torch.nn.Sequential()  # what is left sees a patch alone
    changed = image.clone()
    changed[:, :, 4:8, 8:12] += 1.0  # row 1, column 2
    differs = (encoder(image) != encoder(changed)).any(dim=2)[0]
    assert differs.tolist() == [i == 5 for i in range(9)]
    decoder, tokens = ViTDecoder(TINY, 3, 4, 3), torch.randn(1, 9, 16)
    decoder.blocks = torch.nn.Sequential()
    other = tokens.clone()
    other[:, 5] += torch.randn(16)
    where = (decoder(tokens) != decoder(other)).any(dim=1)[0]
    assert where[4:8, 8:12].all()
    assert where.sum() == 16


def test_equal_patches_are_told_apart_by_their_places() -> None:
    encoder = ViTEncoder(TINY, 1, 4, 4)
    tokens = encoder(torch.ones(1, 1, 16, 16))[0]
    assert torch.cdist(tokens, tokens).fill_diagonal_(1.0).min() > 1e-3


def test_a_block_by_hand() -> None:
    torch.manual_seed(0)
    block, x = ViTBlock(TINY).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    h = block.norm1(x)
    query, key, value = (part.view(2, 5, 2, 6) for part in (h @ block.qkv.weight.T).chunk(3, dim=2))
    heads = []
    for i in range(2):
        weights = (query[:, :, i] @ key[:, :, i].transpose(1, 2) / 6**0.5).softmax(dim=2)
        heads.append(weights @ value[:, :, i])
    x1 = x + block.out(torch.cat(heads, dim=2))
    wanted = x1 + block.down(block.up(block.norm2(x1)).tanh())
    torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (ViTConfig(channels=6), "channels: 6; must be divisible by 4"),
        (ViTConfig(num_heads=0), "num_heads: 0"),
        (ViTConfig(num_heads=3, head_channels=None), "num_heads: 3; must divide the width 512"),
        (ViTConfig(head_channels=0), "head_channels: 0; must be at least 1, or null"),
        (ViTConfig(depth=0), "depth: 0"),
        (ViTConfig(hidden_channels=0), "hidden_channels: 0"),
    ],
)
def test_sizes_that_cannot_be(config: ViTConfig, problem: str) -> None:
    assert (config.problem() or "").startswith(problem)
    assert SMALL.problem() is None
    assert LARGE.problem() is None


def test_weights_in_bf16_are_near_those_in_fp32() -> None:
    torch.manual_seed(0)
    config = ViTConfig(32, 2, 2, 64, 16)
    encoder, decoder = ViTEncoder(config, 3, 4, 4), ViTDecoder(config, 3, 4, 4)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = decoder(encoder(image))
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder.bfloat16()(encoder.bfloat16()(image))
    found.float().square().mean().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
