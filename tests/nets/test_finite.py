"""The first layer whose output is not finite is named."""

import pytest
import torch
from torch import nn

from gmdist.nets.finite import watched


class Inner(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.breaks = breaks

    def forward(self, x):
        return {"out": self.linear(x) / (0.0 if self.breaks else 1.0), "count": torch.arange(3)}


class Outer(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)["out"]
        return x


@pytest.mark.parametrize("broken", [0, 1, 2, None])
def test_the_first_layer_is_named(broken: int | None) -> None:
    network = Outer(*(Inner(i == broken) for i in range(3)))
    with watched(network) as watch:
        network(torch.ones(2, 3))
    assert watch.first() == (None if broken is None else str(broken))
    assert not any(layer._forward_hooks for layer in network.modules())


def test_a_part_is_named_before_the_whole() -> None:
    network = Outer(Inner(False), Inner(False))
    with torch.no_grad():
        network[1].linear.bias[1] = torch.inf
    with watched(network) as watch:
        network(torch.ones(2, 3))
    assert watch.first() == "1.linear"
