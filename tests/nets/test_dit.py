"""The diffusion transformer's sizes against the published ones, its start, its symmetries."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gmdist.nets.blocks import timestep_embedding
from gmdist.nets.dit import DiT, DiTConfig, dit_base, dit_large, dit_small, dit_xl, position_embedding

SMALL = DiTConfig(channels=32, depth=2, num_heads=4)


def perturbed(config: DiTConfig, num_classes: int = 3, size: int = 8) -> DiT:
    torch.manual_seed(0)
    network = DiT(config, 2, num_classes, size).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


# Peebles 2023's networks at patch 2 on latents of 32x32x4, with 1000 classes, the frozen position embedding included.
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (dit_small(), 32_963_360),
        (dit_base(), 130_512_416),
        (dit_large(), 458_102_816),
        (dit_xl(), 675_129_632),
    ],
)
def test_published_sizes(config: DiTConfig, parameters: int) -> None:
    config = dataclasses.replace(config, learned_sigma=True)
    assert config.problem() is None
    with torch.device("meta"):
        network = DiT(config, 4, 1000, 32)
    assert sum(parameter.numel() for parameter in network.parameters()) + network.positions.numel() == parameters


def test_published_work() -> None:
    # Peebles 2023, Tab. 4: 118.64 G multiplications for one image of 256 pixels; 2 FLOPs each.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        DiT(dit_xl(), 4, 1000, 32)(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() / 1e9 == pytest.approx(2 * 118.64, rel=1e-3)


OWN = dataclasses.replace(SMALL, depth=3, block_embeddings=True)


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, qk_norm=True), OWN])
def test_gradients_reach_every_parameter(config: DiTConfig) -> None:
    network = perturbed(config)
    output = network(torch.randn(2, 2, 8, 8), torch.tensor([3.5, 900.0]), torch.tensor([0, 3]))
    assert output.shape == (2, 2, 8, 8)
    assert output.dtype == torch.float32
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_equal_embeddings_of_blocks_are_one_embedding() -> None:
    one, own = perturbed(dataclasses.replace(OWN, block_embeddings=False)), perturbed(OWN)
    copies = {f"block_{kind}s.{i}": kind for kind in ("time", "label") for i in range(2)}
    state = one.state_dict()
    state |= {
        name: state[name.replace(copy, kind)]
        for name in own.state_dict()
        for copy, kind in copies.items()
        if copy in name
    }
    own.load_state_dict(state)
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3.5, 900.0]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(own(*inputs), one(*inputs))
        own.block_labels[1].weight[3] += 1.0  # of the third block, where there is no class
        after = own(*inputs)
    assert torch.equal(after[0], one(*inputs)[0])
    assert (after[1] - one(*inputs)[1]).abs().max() > 1e-3


def test_starts_at_zero_with_blocks_that_are_the_identity() -> None:
    torch.manual_seed(0)
    network = DiT(SMALL, 2, 3, 8)
    x = torch.randn(1, 2, 8, 8)
    assert not network(x, torch.tensor([3]), torch.tensor([0])).any()
    tokens = torch.randn(1, 16, 32)
    assert torch.equal(network.blocks[0](tokens, torch.randn(1, 32)), tokens)


def test_position_embedding_against_the_formula() -> None:
    # The first half of the channels tells the column, the second the row (Peebles 2023's code, after He 2022).
    embedding = position_embedding(3, 8).view(3, 3, 8).double()
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = torch.tensor([place / 10_000 ** (i / 2) for i in range(2)], dtype=torch.float64)
                expected += [angles.sin(), angles.cos()]
            torch.testing.assert_close(embedding[row, column], torch.cat(expected), rtol=0, atol=1e-7)


def test_patches_lie_where_they_came_from() -> None:
    # With one token changed in the middle of the network, one patch of the output changes.
    network = perturbed(SMALL)
    tokens = torch.zeros(1, 16, 4 * 2)
    tokens[0, 4 * 1 + 2] = torch.arange(8.0)  # row 1, column 2; within it row, column, channel
    output = network._joined(tokens)
    patch = output[0, :, 2:4, 4:6]
    assert torch.equal(patch, torch.arange(8.0).view(2, 2, 2).permute(2, 0, 1))
    assert output.count_nonzero() == 7


def test_depends_on_time_and_label() -> None:
    network = perturbed(SMALL)
    x = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        results = [network(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((5.0, 1), (5.5, 1), (5.0, 3))]
    assert (results[0] - results[1]).abs().max() > 1e-4
    assert (results[0] - results[2]).abs().max() > 1e-4


@pytest.mark.parametrize("shift", [0, 1])
def test_frequencies_end_where_the_shift_says(shift: int) -> None:
    # Peebles' code ends one step before a period of 2 pi 10,000 timesteps, diffusers at it.
    embedding = timestep_embedding(torch.tensor([123.0]), 256, frequency_shift=shift)
    last = 123.0 * 10_000 ** (-127 / (128 - shift))
    assert embedding[0, 255].item() == pytest.approx(math.sin(last), rel=1e-5)


def test_qk_norm_bounds_the_logits() -> None:
    # With queries and keys of any scale, attention stays what it is.
    network = perturbed(dataclasses.replace(SMALL, qk_norm=True))
    attention = network.blocks[0].attention
    tokens = torch.randn(1, 16, 32)
    with torch.no_grad():
        attention.qkv.bias.zero_()
        before = attention(tokens)
        attention.qkv.weight[:64] *= 100.0  # queries and keys
        torch.testing.assert_close(attention(tokens), before, rtol=1e-4, atol=1e-5)


def test_learned_sigma_is_left_out() -> None:
    network = perturbed(dataclasses.replace(SMALL, learned_sigma=True))
    assert network.out.out_features == 2 * 2 * 4
    assert network(torch.randn(1, 2, 8, 8), torch.tensor([5]), torch.tensor([1])).shape == (1, 2, 8, 8)


def test_without_classes_and_with_larger_patches() -> None:
    network = perturbed(DiTConfig(16, 1, 2, patch_size=4), num_classes=0, size=12)
    assert network(torch.randn(2, 2, 12, 12), torch.tensor([5, 6])).shape == (2, 2, 12, 12)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"channels": 30}, "channels: 30; must be a multiple of 4"),
        ({"depth": 0}, "depth: 0; must be at least 1"),
        ({"num_heads": 5}, "num_heads: 5; must divide the width 32"),
        ({"patch_size": 0}, "patch_size: 0; must be at least 1"),
        ({"frequency_shift": 2}, "frequency_shift: 2; must be 0 or 1"),
        ({"feed_forward_norm_eps": 1.0}, "feed_forward_norm_eps: 1.0; must be"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], problem: str) -> None:
    assert SMALL.problem() is None
    found = dataclasses.replace(SMALL, **changes).problem()
    assert found is not None
    assert found.startswith(problem)
