"""Equalized layers: what they compute, how they begin, and how fast they learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from gmdist.nets.equalized import EqualizedConv2d, EqualizedLinear, whole_precision
from gmdist.nets.resample import low_pass


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_halve_after_a_low_pass(size: int) -> None:
    torch.manual_seed(0)
    layer = EqualizedConv2d(2, 3, size, down=True, activated=False).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    blurred = low_pass(x, size // 2 + 1)
    wanted = 0.7 * F.conv2d(blurred, layer.weight / (2 * size * size) ** 0.5, stride=2)
    torch.testing.assert_close(layer(x, 0.7), wanted)
    assert layer(x).shape == (1, 3, 4, 4)


def test_an_activation_keeps_the_variance_and_takes_the_gain() -> None:
    torch.manual_seed(0)
    layer = EqualizedConv2d(4, 5, 3).double()
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain = F.conv2d(x, layer.weight / 36**0.5, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, 0.5), 0.5 * math.sqrt(2.0) * F.leaky_relu(plain, 0.2))


def test_features_begin_with_unit_variance_whatever_the_width() -> None:
    torch.manual_seed(0)
    for width in (16, 1024):
        out = EqualizedLinear(width, 2048, lr_multiplier=0.01)(torch.randn(64, width))
        assert 0.9 < out.square().mean() < 1.1


def test_a_learning_rate_multiplier_is_one() -> None:
    # Under Adam every element of the parameters moves by lr: what comes out has then moved as lr * multiplier would.
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    moved = []
    for multiplier in (1.0, 0.01):
        torch.manual_seed(1)
        layer = EqualizedLinear(32, 4, lr_multiplier=multiplier)
        before = layer(x).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        layer(x).sum().backward()
        optimizer.step()
        moved.append((layer(x).detach() - before).abs().mean())
    torch.testing.assert_close(moved[1] / moved[0], torch.tensor(0.01), rtol=1e-2, atol=0.0)


def test_whole_precision_holds_autocast_off() -> None:
    layer, x = EqualizedLinear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with whole_precision(x, wanted=True):
            assert layer(x).dtype == torch.float32
        with whole_precision(x, wanted=False):
            assert layer(x).dtype == torch.bfloat16
    with whole_precision(x, wanted=False):
        assert layer(x).dtype == torch.float32
