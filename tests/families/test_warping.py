"""Affine maps of images: what is copied exactly, what is known in closed form, aliasing, both derivatives."""

import math

import numpy as np
import pytest
import torch

from gmdist.families.warping import _taps, warped

# Of the wavelet sym6, orthonormal, as in tables of it.
SYM6 = [
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
]
COPIED = 5e-5  # by which the finest detail of amplitude 1 may change where pixels are copied


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2.0 * torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) - 1.0


def maps(linear: list[list[float]], shift: tuple[float, float] = (0.0, 0.0), count: int = 1) -> torch.Tensor:
    columns = [[*row, offset] for row, offset in zip(linear, shift, strict=True)]
    return torch.tensor(columns, dtype=torch.float64).expand(count, -1, -1)


def turn(angle: float, scale: float = 1.0) -> list[list[float]]:
    """Clockwise, as y points down."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return [[c, -s], [s, c]]


def waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cos(0.5 * x + 0.3 * y + 0.4) + 0.5 * torch.sin(0.2 * x - 0.6 * y)


def places(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [W], y [H, 1] of pixels, from the centre."""
    x, y = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in (width, height))
    return x, y[:, None]


def test_the_filter_has_the_gain_of_sym6_and_is_as_orthogonal() -> None:
    taps = _taps(torch.arange(-40, 41)).numpy()
    np.testing.assert_array_equal(taps, taps[::-1])
    frequency = np.linspace(0.0, np.pi, 50)
    wanted = np.abs(np.exp(-1j * np.outer(frequency, np.arange(12))) @ SYM6) / math.sqrt(2.0)
    np.testing.assert_allclose(np.cos(np.outer(frequency, np.arange(-40, 41))) @ taps, wanted, atol=5e-5)
    products = 2.0 * np.convolve(taps, taps)[80::2]
    np.testing.assert_allclose(products, np.eye(1, len(products))[0], atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_stays_in_its_place_stays_as_it_is(dtype: torch.dtype) -> None:
    image = noise(3, 2, 7, 8).to(dtype)
    which = torch.cat([maps(turn(0.0)), maps(turn(0.3)), maps(turn(0.0))])
    moved = warped(image, which)
    assert moved.dtype == dtype
    assert torch.equal(moved[::2], image[::2])
    assert not torch.equal(moved[1], image[1])


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (9, 6), (2, 3)])
def test_what_is_moved_by_whole_pixels_is_copied_and_goes_on_mirrored(size: tuple[int, int]) -> None:
    image = noise(1, 3, *size)
    height, width = size
    for x, y in ((1, 0), (0, -1), (-1, 1), (width, -2 * height)):
        moved = warped(image, maps(turn(0.0), (x, y)))
        rows, columns = (np.pad(np.arange(side), 3 * side, "reflect") for side in size)
        wanted = image[:, :, rows[3 * height - y :][:height]][..., columns[3 * width - x :][:width]]
        torch.testing.assert_close(moved, wanted, rtol=0, atol=COPIED)


@pytest.mark.parametrize("side", [8, 7])
def test_quarter_turns_and_mirrors_copy(side: int) -> None:
    image = noise(1, 3, side, side)
    for quarters, linear in enumerate(([[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]])):
        moved = warped(image, maps(linear))
        torch.testing.assert_close(moved, torch.rot90(image, -quarters, (2, 3)), rtol=0, atol=COPIED)
    torch.testing.assert_close(warped(image, maps([[-1, 0], [0, 1]])), image.flip(3), rtol=0, atol=COPIED)
    torch.testing.assert_close(warped(image, maps([[1, 0], [0, -1]])), image.flip(2), rtol=0, atol=COPIED)


@pytest.mark.parametrize(
    ("linear", "shift"),
    [(turn(0.4), (0.0, 0.0)), (turn(-2.0, 1.3), (1.25, -0.5)), ([[1.2, 0.1], [-0.3, 0.9]], (-0.75, 2.0))],
)
def test_a_known_picture_goes_where_the_map_says(linear: list[list[float]], shift: tuple[float, float]) -> None:
    x, y = places(30, 40)
    moved = warped(waves(x, y)[None, None], maps(linear, shift))[0, 0]
    back = torch.linalg.inv(torch.tensor(linear, dtype=torch.float64))
    from_x = back[0, 0] * (x - shift[0]) + back[0, 1] * (y - shift[1])
    from_y = back[1, 0] * (x - shift[0]) + back[1, 1] * (y - shift[1])
    is_inside = (from_x.abs() < 13) & (from_y.abs() < 8)  # what lies near the border reads beyond it
    is_inside &= (x.abs() < 14) & (y.abs() < 9)
    assert is_inside.sum() > 100
    torch.testing.assert_close(moved[is_inside], waves(from_x, from_y)[is_inside], rtol=0, atol=0.02)


def test_there_and_back_is_near_where_it_began() -> None:
    x, y = places(32, 32)
    image = (torch.cos(4 * math.pi * (x / 31 + 0.5)) * torch.cos(3 * math.pi * (y / 31 + 0.5)))[None, None]
    for factor, angle in ((0.8, 0.0), (0.7, 0.6), (0.65, -2.5)):  # small enough for the corners to stay inside
        there, back = maps(turn(angle, factor)), maps(turn(-angle, 1.0 / factor))
        difference = warped(warped(image, there), back) - image
        assert difference[:, :, 2:-2, 2:-2].abs().max() < 0.025


def test_detail_too_fine_for_a_smaller_image_becomes_grey() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1.0)[None, None]
    assert warped(board, maps(turn(0.0, 0.5)))[0, 0, 10:-10, 10:-10].abs().max() < 0.02
    assert warped(torch.ones(1, 1, 32, 32), maps(turn(0.3, 0.5))).sub(1.0).abs().max() < 1e-5


def test_both_derivatives() -> None:
    which = torch.cat([maps(turn(0.7, 0.8), (0.3, -0.6)), maps([[1.3, 0.2], [-0.4, 0.7]]), maps(turn(0.0))])
    image = noise(3, 2, 5, 6, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda image: warped(image, which), (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda image: warped(image, which).tanh(), (image,), fast_mode=True)


def test_a_gradient_penalty_goes_through() -> None:
    # R1 of a judge (w * warped(x)).square().sum() / 2 is |W' diag(w^2) W x|^2, with the warp as a matrix W.
    which, image = maps(turn(0.5, 1.1), (0.4, 0.0)), noise(1, 1, 4, 5, dtype=torch.float64).requires_grad_(True)
    weight = noise(1, 1, 4, 5, dtype=torch.float64).add(2.0).requires_grad_(True)
    loss = (weight * warped(image, which)).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), weight)

    matrix = torch.stack([warped(one.view(1, 1, 4, 5), which).flatten() for one in torch.eye(20).double()], dim=1)
    w = weight.detach().flatten().requires_grad_(True)
    penalty = (matrix.t() @ (w.square() * (matrix @ image.detach().flatten()))).square().sum()
    torch.testing.assert_close(gradient.square().sum(), penalty)
    torch.testing.assert_close(found.flatten(), torch.autograd.grad(penalty, w)[0])


def test_autocast_leaves_it_in_fp32() -> None:
    which, image = maps(turn(0.5, 0.9), count=2), noise(2, 3, 8, 8).requires_grad_(True)

    def judged() -> tuple[torch.Tensor, ...]:
        moved = warped(image, which)
        (gradient,) = torch.autograd.grad(moved.pow(3).sum(), image, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), image)
        return moved, gradient, second

    expected = judged()
    with torch.autocast("cpu", torch.bfloat16):
        found = judged()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_image_does_not_depend_on_its_batch() -> None:
    image = noise(6, 3, 16, 16)
    which = torch.cat([maps(turn(0.5 * i, 0.8 + 0.1 * i), (0.7 * i, -i)) for i in range(6)])
    whole, order = warped(image, which), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(warped(image[order], which[order]), whole[order])
    torch.testing.assert_close(warped(image[2:4], which[2:4]), whole[2:4], rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_gradients_are_the_same_every_time_and_everywhere(device: torch.device) -> None:
    image, which = noise(4, 3, 32, 32), torch.cat([maps(turn(0.5 * i, 0.5 + 0.4 * i)) for i in range(4)])

    def derived(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        on_device = image.to(device).requires_grad_(True)
        moved = warped(on_device, which.to(device))
        return moved.detach(), torch.autograd.grad(moved.pow(3).sum(), on_device)[0]

    moved, gradient = derived(device)
    for one, other in zip((moved, gradient), derived(torch.device("cpu")), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(derived(device)[1], gradient) for _ in range(5))
