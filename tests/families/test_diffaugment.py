"""DiffAugment: each policy by hand, how much it does, both derivatives, samples by their keys."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from gmdist.families.diffaugment import POLICIES, augmented, cut_out, recolored, translated

KEYS = torch.arange(8)


def pictures(count: int = 8, channels: int = 3, side: int = 16, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2.0 * torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype) - 1.0


def test_colours_by_hand() -> None:
    image, one = pictures(2), torch.ones(2, dtype=torch.float64)
    close = torch.testing.assert_close
    close(recolored(image, 0.3 * one, one, one), image + 0.3)
    grey = image.mean(dim=1, keepdim=True)
    close(recolored(image, 0.0 * one, 1.8 * one, one), grey + 1.8 * (image - grey))
    mean = torch.stack([picture.mean() for picture in image])[:, None, None, None]
    close(recolored(image, 0.0 * one, one, 0.6 * one), mean + 0.6 * (image - mean))
    close(recolored(image[:, :1], 0.2 * one, 0.0 * one, one), image[:, :1] + 0.2)  # grey has no saturation


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 1), (-1, 3), (-2, -2)])
def test_what_is_moved_leaves_zeros(down: int, right: int) -> None:
    image = pictures(1)[:, :, :14]
    padded = F.pad(image, (3, 3, 3, 3))[:, :, 3 - down : 17 - down, 3 - right : 19 - right]
    assert torch.equal(translated(image, torch.tensor([down]), torch.tensor([right])), padded)


def test_half_of_the_sides_is_cut_out() -> None:
    image = pictures(3, side=16) + 5.0
    found = cut_out(image, torch.tensor([8, 0, 16]), torch.tensor([8, 3, 16]))
    wanted = image.clone()
    wanted[0, :, 4:12, 4:12] = 0.0
    wanted[1, :, :4, :7] = 0.0
    wanted[2, :, 12:, 12:] = 0.0
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("side", [16, 13])
def test_how_much_is_drawn(side: int) -> None:
    count, shift, length = 4000, int(side / 8 + 0.5), int(side / 2 + 0.5)
    keys, ones = torch.arange(count), torch.ones(count, 1, side, side)
    # Of an image of ones, what is not zero tells the shift and the cut; brightness is all that moves its mean.
    rows = augmented(ones, keys, ("translation",), 0, "a")[:, 0].amax(dim=2).numpy()
    shifts = np.where(rows[:, 0] == 0.0, (rows == 0.0).sum(axis=1), -(rows == 0.0).sum(axis=1)) + shift
    assert stats.chisquare(np.bincount(shifts, minlength=2 * shift + 1)).pvalue > 1e-3
    cut = 1.0 - augmented(ones, keys, ("cutout",), 0, "a")[:, 0].amin(dim=2).numpy()
    edges = np.sort(cut.sum(axis=1).astype(int))
    assert edges[0] == length - length // 2  # the other half lies outside
    assert edges[-1] == length
    values = augmented(ones, keys, ("color",), 0, "a")[:, 0, 0, 0].numpy()
    assert stats.kstest(values, stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3


def test_factors_are_drawn_evenly() -> None:
    x = torch.tensor([1.0, -0.5, -0.5]).view(1, 3, 1, 1).expand(4000, -1, 1, 2).clone()  # grey 0, and so is the mean
    found = augmented(x, torch.arange(4000), ("color",), 0, "a").double()
    product = (found[:, 0] - found[:, 1])[:, 0, 0] / 1.5  # of saturation and contrast
    assert 0.0 <= product.min() < 0.05
    assert 2.5 < product.max() <= 3.0
    assert product.mean() == pytest.approx(1.0, abs=0.05)
    y = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(4000, 3, -1, -1).clone()
    found = augmented(y, torch.arange(4000), ("color",), 0, "a")
    contrast = ((found[..., 1] - found[..., 0]) / 2.0)[:, 0, 0].numpy()
    assert stats.kstest(contrast, stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3


def test_policies_add_to_one_another() -> None:
    image = pictures()
    step = image
    for policy in POLICIES:
        step = augmented(step, KEYS, (policy,), 0, "a")
    assert torch.equal(augmented(image, KEYS, POLICIES[::-1], 0, "a"), step)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_does_not_depend_on_its_batch(channels: int) -> None:
    image = pictures(8, channels, dtype=torch.float32)
    whole, order = augmented(image, KEYS, POLICIES, 0, "augment/real"), torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    assert torch.equal(augmented(image[order], KEYS[order], POLICIES, 0, "augment/real"), whole[order])
    torch.testing.assert_close(augmented(image[2:5], KEYS[2:5], POLICIES, 0, "augment/real"), whole[2:5])
    for seed, purpose in ((1, "augment/real"), (0, "augment/fake")):
        assert not torch.allclose(augmented(image, KEYS, POLICIES, seed, purpose), whole, atol=0.1)
    assert augmented(image.bfloat16(), KEYS, POLICIES, 0, "augment/real").dtype == torch.bfloat16


def test_both_derivatives() -> None:
    image = pictures(2, 3, 5).requires_grad_(True)
    function = lambda image: augmented(image, KEYS[:2], POLICIES, 0, "a").tanh()
    assert torch.autograd.gradcheck(function, (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (image,), fast_mode=True)
