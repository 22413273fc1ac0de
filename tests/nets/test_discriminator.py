"""The discriminator of patches: its size, what a logit sees, and that samples do not meet in it."""

import pytest
import torch
from torch import nn

from gmdist.nets.discriminator import PatchDiscriminator, sizes_problem, smallest_side


def test_has_the_published_size() -> None:
    # pix2pix's "n_layers" discriminator with batch norm on RGB, counted from its layers: kernels of 4x4 between 3, 64,
    # 128, 256, 512 and 1 channels, biases in the first and last, and two parameters a channel for each of three norms.
    net = PatchDiscriminator(3)
    expected = (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) * 16 + 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in net.parameters()) == expected == 2_765_633


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_judges_its_patch(num_layers: int, patch: int) -> None:
    net = PatchDiscriminator(1, 8, num_layers)
    for number, layer in enumerate(net.layers):
        if isinstance(layer, nn.GroupNorm):  # its statistics are those of the whole image
            net.layers[number] = nn.Identity()
    image = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = net(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], image)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == patch


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_side_gives_one_logit(num_layers: int) -> None:
    side = smallest_side(num_layers)
    net = PatchDiscriminator(1, 8, num_layers)
    assert net(torch.randn(1, 1, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 1, side - 1, side - 1))
    assert sizes_problem(8, num_layers, side) is None
    assert (sizes_problem(8, num_layers, side - 1) or "").startswith(f"num_layers: {num_layers}; must be at least 1, ")


def test_a_sample_is_judged_alone() -> None:
    torch.manual_seed(0)
    net, image = PatchDiscriminator(3, 8, 2).train(), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(image)[1:2], net(image[1:2]), rtol=1e-5, atol=1e-6)
    assert not list(net.buffers())
