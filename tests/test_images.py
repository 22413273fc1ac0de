"""Images: the way from tensors to PNG files loses nothing, and a grid shows every image once."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.data.decode import decode_image
from gmdist.images import grid, png, to_uint8


def test_all_levels_survive_the_range_of_training() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    scaled = levels.permute(0, 3, 1, 2).float() * (1 / 127.5) - 1
    assert torch.equal(to_uint8(scaled), levels)


def test_values_beyond_the_range_are_cut() -> None:
    values = torch.tensor([-9.0, -1.001, -1.0, 0.0, 0.999, 1.0, 1.5, float("inf"), -float("inf")])
    levels = to_uint8(values.reshape(1, 1, 1, -1))
    assert levels.flatten().tolist() == [0, 0, 0, 128, 255, 255, 255, 255, 0]


def test_channels_move_last() -> None:
    images = torch.rand(2, 3, 4, 5) * 2 - 1
    levels = to_uint8(images.bfloat16())
    assert (levels.shape, levels.dtype) == ((2, 4, 5, 3), torch.uint8)
    expected = (images[1, 2, 3, 4] + 1) * 127.5
    assert abs(int(levels[1, 3, 4, 2]) - float(expected)) < 2


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_png_holds_the_pixels(channels: int, mode: str, as_array: bool) -> None:
    image = torch.randint(0, 256, (5, 7, channels), dtype=torch.uint8)
    content = png(image.numpy() if as_array else image)
    assert np.array_equal(decode_image(content, channels), image.numpy())
    opened = Image.open(io.BytesIO(content))
    assert (opened.format, opened.mode, opened.size) == ("PNG", mode, (7, 5))


def test_a_grid_shows_every_image_where_it_belongs() -> None:
    images = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 4, 1)
    sheet = grid(images, columns=3)
    assert sheet.shape == (3 * 3 + 2 * 2, 3 * 4 + 2 * 2, 1)
    for i in range(7):
        row, column = divmod(i, 3)
        top, left = row * 5, column * 6
        assert (sheet[top : top + 3, left : left + 4] == i).all()
    # What is no image is white.
    assert int((sheet == 255).sum()) == sheet.numel() - 7 * 12


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (4, 2), (10, 10), (16, 4), (40, 10), (100, 10), (64, 8), (7, 3), (2, 1)]
)
def test_columns_fit_the_number_of_images(count: int, columns: int) -> None:
    sheet = grid(torch.zeros(count, 2, 2, 3, dtype=torch.uint8))
    assert sheet.shape == (4 * -(-count // columns) - 2, 4 * columns - 2, 3)
