"""ADA: what is drawn and how often, maps and colours by hand, grey images, samples by their keys."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from gmdist.families.ada import Transforms, augmented, colors, draw, maps, recolored
from gmdist.families.warping import warped

COUNT = 20_000
NEUTRAL = {
    **dict.fromkeys(("mirror", "scale", "stretch", "contrast", "luma", "saturation"), 1.0),
    **dict.fromkeys(("quarters", "shift", "angle", "last_angle", "drift", "brightness", "hue"), 0.0),
}


def at(p: float) -> torch.Tensor:
    return torch.tensor(p)


def drawn(p: float, purpose: str = "augment/real") -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in draw(torch.arange(COUNT), at(p), 0, purpose)._asdict().items()}


def transforms(**values: float | list[float]) -> Transforms:
    """Those of one sample, neutral but for what is named."""
    plain = {name: [value] for name, value in NEUTRAL.items()} | {"shift": [[0.0, 0.0]], "drift": [[0.0, 0.0]]}
    plain |= {name: [value] for name, value in values.items()}
    return Transforms(**{name: torch.tensor(value, dtype=torch.float64) for name, value in plain.items()})


def pictures(count: int, channels: int = 3, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2.0 * torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype) - 1.0


def test_what_always_takes_place_is_distributed_as_in_the_paper() -> None:
    found = drawn(1.0)
    spreads = {
        "scale": np.log2(found["scale"]) / 0.2,
        "stretch": np.log2(found["stretch"]) / 0.2,
        "drift x": found["drift"][:, 0] / 0.125,
        "drift y": found["drift"][:, 1] / 0.125,
        "brightness": found["brightness"] / 0.2,
        "contrast": np.log2(found["contrast"]) / 0.5,
        "saturation": np.log2(found["saturation"]),
    }
    shares = {name: (found[name] / math.pi + 1.0) / 2.0 for name in ("angle", "last_angle", "hue")}
    shares |= {f"shift {i}": found["shift"][:, i] / 0.25 + 0.5 for i in (0, 1)}
    for values, distribution in ((spreads, "norm"), (shares, "uniform")):
        for name, numbers in values.items():
            assert stats.kstest(numbers, distribution).pvalue > 1e-3, name
    columns = np.stack([*spreads.values(), *shares.values()])
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 5 / math.sqrt(COUNT)
    for name in ("mirror", "luma"):
        assert set(found[name]) == {-1.0, 1.0}
        assert abs(found[name].mean()) < 5 / math.sqrt(COUNT)
    assert stats.chisquare(np.bincount(found["quarters"].astype(int), minlength=4)).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_each_takes_place_with_probability_p_whatever_the_others_do(p: float) -> None:
    found = drawn(p)
    happens = {name: (value != NEUTRAL[name]).reshape(COUNT, -1).any(axis=1) for name, value in found.items()}
    chances = dict.fromkeys(NEUTRAL, p) | dict.fromkeys(("angle", "last_angle"), 1.0 - math.sqrt(1.0 - p))
    chances |= {"mirror": p / 2, "luma": p / 2, "quarters": 3 * p / 4}  # the neutral ones are drawn too
    for name, chance in chances.items():
        assert abs(happens[name].mean() - chance) < 5 * math.sqrt(chance / COUNT), name
    assert abs((happens["angle"] | happens["last_angle"]).mean() - p) < 5 * math.sqrt(p / COUNT)
    together = np.corrcoef(np.stack(list(happens.values())))
    assert np.abs(together - np.eye(len(together))).max() < 5 / math.sqrt(COUNT)


def test_what_took_place_at_a_lower_p_still_does_at_a_higher() -> None:
    low, high = drawn(0.2), drawn(0.7)
    for name, value in low.items():
        happens = value != NEUTRAL[name]
        np.testing.assert_array_equal(value[happens], high[name][happens])


def test_other_purposes_get_other_numbers() -> None:
    one, other = drawn(1.0), drawn(1.0, "augment/fake")
    assert abs(np.corrcoef(one["brightness"], other["brightness"])[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_0_images_come_out_as_they_are(channels: int, dtype: torch.dtype) -> None:
    image = pictures(5, channels).to(dtype).requires_grad_(True)
    result = augmented(image, torch.arange(5), at(0.0), 0, "augment/real")
    assert result.dtype == dtype
    assert torch.equal(result, image)
    weight = torch.rand_like(image)
    assert torch.equal(torch.autograd.grad((weight * result).sum(), image)[0], weight)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    image, keys, p = pictures(8), torch.arange(8) + 2**40, at(0.7)
    whole, order = augmented(image, keys, p, 3, "augment/real"), torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    assert torch.equal(augmented(image[order], keys[order], p, 3, "augment/real"), whole[order])
    part = augmented(image[2:5], keys[2:5], p, 3, "augment/real")
    torch.testing.assert_close(part, whole[2:5], rtol=0, atol=1e-5)
    assert not torch.allclose(augmented(image, keys, p, 4, "augment/real"), whole, atol=0.1)
    assert not torch.allclose(augmented(image, keys + 8, p, 3, "augment/real"), whole, atol=0.1)


def test_both_derivatives() -> None:
    image = pictures(3, side=5, dtype=torch.float64).requires_grad_(True)
    function = lambda image: augmented(image, torch.arange(3), at(0.8), 0, "augment/real").tanh()
    assert torch.autograd.gradcheck(function, (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (image,), fast_mode=True)


def test_grey_images_are_what_coloured_ones_without_colour_become() -> None:
    image, keys = pictures(16, 1, dtype=torch.float64), torch.arange(16)
    grey = augmented(image, keys, at(0.8), 0, "augment/real")
    coloured = augmented(image.expand(-1, 3, -1, -1), keys, at(0.8), 0, "augment/real")
    torch.testing.assert_close(grey.expand(-1, 3, -1, -1), coloured)
    assert (grey - image).flatten(1).abs().amax(dim=1).gt(0.05).sum() > 12


def rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def moving(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def test_a_map_is_the_product_of_all_transforms_in_their_order() -> None:
    t = transforms(
        mirror=-1.0,
        quarters=3.0,
        shift=[0.1, -0.07],
        scale=1.2,
        angle=0.5,
        stretch=0.8,
        last_angle=-1.1,
        drift=[0.03, 0.2],
    )
    wanted = np.eye(3)
    for matrix in (
        scaling(-1, 1),
        rotation(1.5 * math.pi),
        moving(4, -1),  # 0.1 * 40 and -0.07 * 20, rounded
        scaling(1.2, 1.2),
        rotation(0.5),
        scaling(0.8, 1 / 0.8),
        rotation(-1.1),
        moving(0.03 * 40, 0.2 * 20),
    ):
        wanted = matrix @ wanted
    np.testing.assert_allclose(maps(t, 20, 40)[0], wanted[:2], atol=1e-12)


def test_what_only_copies_pixels_copies_them() -> None:
    image = pictures(1)
    t = transforms(mirror=-1.0, quarters=1.0, shift=[0.125, -0.0625])
    turned = torch.rot90(image.flip(3), -1, (2, 3))
    padded = torch.nn.functional.pad(turned, (2, 0, 0, 1), mode="reflect")[:, :, 1:, :16]
    torch.testing.assert_close(warped(image, maps(t, 16, 16)), padded, rtol=0, atol=5e-5)


def colored(image: torch.Tensor, **values: float) -> torch.Tensor:
    return recolored(image, colors(transforms(**values), image.shape[1]))


def test_colours_by_hand() -> None:
    image = pictures(1, dtype=torch.float64)
    grey = image.mean(dim=1, keepdim=True)
    close = torch.testing.assert_close
    close(colored(image, brightness=0.3), image + 0.3)
    close(colored(image, contrast=1.7), 1.7 * image)
    close(colored(image, luma=-1.0), image - 2.0 * grey)
    close(colored(image, saturation=0.4), grey + 0.4 * (image - grey))
    close(colored(image, brightness=0.3, contrast=1.7), 1.7 * (image + 0.3))
    close(colored(image, brightness=0.3, luma=-1.0), image - 2.0 * grey - 0.3)


def test_hue_turns_around_the_grey_axis() -> None:
    image = pictures(1, dtype=torch.float64)
    third = 2.0 * math.pi / 3.0
    close = torch.testing.assert_close
    close(colored(image, hue=third), image.roll(1, dims=1))  # red becomes green, green blue
    close(colored(image, hue=-third), image.roll(-1, dims=1))
    grey = image.mean(dim=1, keepdim=True)
    turned = colored(image, hue=0.7)
    close(turned.mean(dim=1, keepdim=True), grey)
    close(turned.square().sum(dim=1), image.square().sum(dim=1))
    cosine = ((turned - grey) * (image - grey)).sum(dim=1) / (image - grey).square().sum(dim=1)
    close(cosine, torch.full_like(cosine, math.cos(0.7)))


def test_colours_follow_one_another() -> None:
    image = pictures(1, dtype=torch.float64)
    values = {"brightness": 0.2, "contrast": 0.6, "luma": -1.0, "hue": 2.0, "saturation": 1.9}
    wanted = image
    for name, value in values.items():
        wanted = colored(wanted, **{name: value})
    torch.testing.assert_close(colored(image, **values), wanted)
