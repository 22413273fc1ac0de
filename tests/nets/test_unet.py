"""The UNet's sizes against the published ones, and what conditions it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gmdist.nets.unet import (
    UNet,
    UNetConfig,
    sizes_embedding,
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
)

SMALL = UNetConfig(
    channels=16,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_levels=(0,),
    head_channels=8,
    context_channels=12,
    transformer_depths=(1, 2),
    vector_channels=6,
)


def perturbed(config: UNetConfig, num_classes: int = 0) -> UNet:
    """A small network of which no branch begins as the identity."""
    torch.manual_seed(0)
    network = UNet(config, 3, num_classes).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def inputs(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    known: dict[str, Any] = {
        "x": torch.randn(2, 3, 8, 8),
        "timesteps": torch.tensor([3.0, 700.5]),
        "label": torch.tensor([1, 4]),
        "context": torch.randn(2, 5, 12),
        "vector": torch.randn(2, 6),
    }
    return known | changes


# Parameters and tensors of the published weights: CompVis' v1, Stability's v2 and SDXL base 1.0.
@pytest.mark.parametrize(
    ("config", "in_channels", "parameters", "tensors"),
    [
        (stable_diffusion_1(), 4, 859_520_964, 686),
        (stable_diffusion_1(), 9, 859_535_364, 686),  # inpainting
        (stable_diffusion_2(), 4, 865_910_724, 686),
        (stable_diffusion_xl(), 4, 2_567_463_684, 1680),
    ],
)
def test_published_sizes(config: UNetConfig, in_channels: int, parameters: int, tensors: int) -> None:
    assert config.problem() is None
    with torch.device("meta"):
        network = UNet(config, in_channels, out_channels=4)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(list(network.parameters())) == tensors
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}
    assert {norm.eps for norm in norms} == {1e-5, 1e-6}


@pytest.mark.parametrize(("side", "gflops"), [(32, 180.1), (64, 803.3)])
def test_published_work(side: int, gflops: float) -> None:
    # A forward of Stable Diffusion 1 on one image of 256 and of 512 pixels, 2 FLOPs a multiplication: so it has its
    # transformers at the right resolutions.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = UNet(stable_diffusion_1(), 4)
        network(torch.empty(1, 4, side, side), torch.empty(1), context=torch.empty(1, 77, 768))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_gradients_reach_every_parameter() -> None:
    network = perturbed(SMALL, num_classes=4)
    output = network(**inputs())
    assert output.shape == (2, 3, 8, 8)
    assert output.dtype == torch.float32
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["timesteps", "label", "context", "vector"])
def test_depends_on_each_condition(name: str) -> None:
    network = perturbed(SMALL, num_classes=4)
    known = inputs()
    changed = (
        torch.tensor([2, 4])
        if name == "label"
        else known[name] * torch.tensor([0.5, 1.0]).view(2, *[1] * (known[name].ndim - 1))
    )
    with torch.no_grad():
        before, after = network(**known), network(**inputs(**{name: changed}))
    assert (before[0] - after[0]).abs().max() > 1e-4
    torch.testing.assert_close(before[1], after[1])  # its own condition alone


def test_sines_first_is_another_order_of_the_same_network() -> None:
    cosines = perturbed(SMALL, num_classes=4)
    sines = UNet(dataclasses.replace(SMALL, sines_first=True), 3, 4).eval()
    state = cosines.state_dict()
    state["time.0.weight"] = state["time.0.weight"].roll(8, 1)
    sines.load_state_dict(state)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs().items()}
    with torch.no_grad():
        torch.testing.assert_close(sines.double()(**exact), cosines.double()(**exact))


def test_a_mask_hides_padding_exactly() -> None:
    network = perturbed(SMALL, num_classes=4)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    known = inputs(context_mask=mask)
    other = known["context"].clone()
    other[0, 3:] = 1e4
    with torch.no_grad():
        masked, changed = network(**known), network(**(known | {"context": other}))
        cut = network(**(inputs(context=known["context"][:, :3])))
    assert torch.equal(masked, changed)
    torch.testing.assert_close(masked[0], cut[0])  # as if the padding were not there
    assert not torch.allclose(masked[1], cut[1])


def test_a_context_is_given_to_networks_with_one_alone() -> None:
    with pytest.raises(AssertionError):
        perturbed(SMALL, num_classes=4)(**inputs(context=None))
    plain = dataclasses.replace(SMALL, context_channels=None, transformer_depths=(), vector_channels=None)
    with pytest.raises(AssertionError):
        perturbed(plain, num_classes=4)(**inputs(vector=None))


def test_the_embedding_of_sizes_is_each_size_in_turn() -> None:
    embedded = sizes_embedding(torch.tensor([[512.0, 768.0, 0.0, 13.0, 512.0, 1024.0]]))
    assert embedded.shape == (1, 6 * 256)
    assert embedded[0, 256].item() == pytest.approx(torch.tensor(768.0).cos().item(), abs=1e-5)
    torch.testing.assert_close(embedded[0, 512:768], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_linear_and_convolutional_projections_are_the_same_function() -> None:
    convolutional = perturbed(SMALL, num_classes=4)
    linear = UNet(dataclasses.replace(SMALL, linear_projections=True), 3, 4).eval()
    shapes = {name: value.shape for name, value in linear.state_dict().items()}
    state: dict[str, Tensor] = convolutional.state_dict()
    linear.load_state_dict({name: value.view(shapes[name]) for name, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(linear(**inputs()), convolutional(**inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"head_channels": 12}, "head_channels: 12; must divide the attended widths [16, 32]"),
        ({"context_channels": 0}, "context_channels: 0; must be at least 1, or null"),
        ({"vector_channels": -1}, "vector_channels: -1; must be at least 1, or null"),
        ({"context_channels": None}, "transformer_depths: only transformers have it"),
        ({"context_channels": None, "transformer_depths": (), "linear_projections": True}, "linear_projections: only"),
        (
            {"transformer_depths": (1,)},
            "transformer_depths: [1]; must be a number of at least 1 for each of the 2 levels",
        ),
        ({"transformer_depths": (1, 0)}, "transformer_depths: [1, 0]; must be"),
        ({"norm_groups": 5}, "norm_groups: 5; must divide the widths [16, 32], as 4 does"),
        ({"frequency_shift": 2}, "frequency_shift: 2; must be 0, or 1"),
        (
            {"channels": 2, "head_channels": 2, "frequency_shift": 1},
            "frequency_shift: 1; must be 0, or 1 for more than",
        ),
        ({"norm_eps": 0.0}, "norm_eps: 0.0; must be above 0"),
        ({"head_channels": None, "num_heads": 3}, "num_heads: 3; must divide the attended widths [16, 32]"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], problem: str) -> None:
    assert SMALL.problem() is None
    found = dataclasses.replace(SMALL, **changes).problem()
    assert found is not None
    assert found.startswith(problem)
