"""StyleGAN2's family: path lengths against finite differences, mixing, truncation, running means, presets."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.families.family import Batch, Surroundings
from gmdist.families.stylegan2 import PathLengthConfig, StyleGAN2, StyleGAN2Config, path_lengths
from gmdist.families.stylegan2_presets import PRESETS, preset_settings
from tests.support import SIZE, SMALL, MemorySource, small_family


def made(**changes: object) -> StyleGAN2:
    family = small_family("stylegan2", **changes)
    assert isinstance(family, StyleGAN2)
    return family


def batch(count: int = 8, start: int = 0) -> Batch:
    return {name: tensor[start:] for name, tensor in MemorySource(48, 8).first(count + start).batch.items()}


def test_path_lengths_against_finite_differences() -> None:
    torch.manual_seed(0)
    synthesis = made().generator.synthesis.double()
    styles = torch.randn(2, synthesis.num_styles, 16, dtype=torch.float64)
    noise = torch.randn(2, 1, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        squares = torch.zeros(2, dtype=torch.float64)
        for layer in range(synthesis.num_styles):
            for i in range(16):
                step = torch.zeros_like(styles)
                step[:, layer, i] = 1e-5
                moved = (synthesis(styles + step) - synthesis(styles - step)) / 2e-5  # J^T y for y = noise / sqrt(HW)
                squares += (moved * noise).sum(dim=(1, 2, 3)).square() / SIZE**2
    styles.requires_grad_()
    found = path_lengths(synthesis(styles), styles, noise)
    torch.testing.assert_close(found, (squares / synthesis.num_styles).sqrt(), rtol=1e-6, atol=1e-9)


def test_path_lengths_of_a_network_in_fp32_are_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    synthesis = made(generator=dataclasses.replace(SMALL["stylegan2"].generator, num_bf16_sides=0)).generator.synthesis
    styles, noise = torch.randn(2, synthesis.num_styles, 16, requires_grad=True), torch.randn(2, 1, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found = path_lengths(synthesis(styles), styles, noise)
    torch.testing.assert_close(found, path_lengths(synthesis(styles), styles, noise))


def test_what_a_weight_gets_from_path_lengths_against_finite_differences() -> None:
    torch.manual_seed(0)
    synthesis = made().generator.synthesis.double()
    start, noise = torch.randn(2, synthesis.num_styles, 16).double(), torch.randn(2, 1, SIZE, SIZE).double()
    weight = synthesis.blocks[0].conv1.weight  # type: ignore[union-attr, index]

    def loss() -> Tensor:
        styles = start.clone().requires_grad_()
        return (path_lengths(synthesis(styles), styles, noise) - 0.3).square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight[1, 2, 0, 1] += 1e-5
    above = loss()
    with torch.no_grad():
        weight[1, 2, 0, 1] -= 2e-5
    assert gradient[1, 2, 0, 1].item() == pytest.approx(((above - loss()) / 2e-5).item(), rel=1e-4)


def test_the_mean_path_length_is_one_of_all_that_a_step_measured() -> None:
    whole, cut = made(), made()
    _, metrics = whole.path_length_loss(batch(), 0)
    for start in (0, 4):
        cut.path_length_loss(batch(4, start), 0)
    for family in (whole, cut):
        family.g_loss(batch(), 0)
        family.after_step(0)
    torch.testing.assert_close(whole.mean_length, 0.01 * metrics["length"])
    torch.testing.assert_close(cut.mean_length, whole.mean_length)
    before = whole.mean_length.clone()
    whole.g_loss(batch(), 0)
    whole.after_step(8)  # a step without a measurement
    assert torch.equal(whole.mean_length, before)


def test_path_lengths_are_measured_on_a_part() -> None:
    family = made(path_length=PathLengthConfig(batch_shrink=2))
    half = made(path_length=PathLengthConfig(batch_shrink=1))
    torch.testing.assert_close(family.path_length_loss(batch(8), 0)[0], half.path_length_loss(batch(4), 0)[0])
    assert family.path_length_loss(batch(1), 0)[0] > 0.0


def test_most_images_mix_two_styles() -> None:
    family, keys = made(), torch.arange(400)
    label = torch.zeros_like(keys)
    styles = family._mixed_styles(keys, label, "g")
    is_other = (styles != styles[:, :1]).any(dim=2)
    assert 0.85 < is_other.any(dim=1).float().mean() < 0.95
    first = is_other.float().argmax(dim=1)[is_other.any(dim=1)]
    assert set(first.tolist()) == set(range(1, family.generator.synthesis.num_styles))
    assert (is_other[:, 1:] >= is_other[:, :-1]).all()  # from there on, all
    torch.testing.assert_close(family._mixed_styles(keys[5:7], label[5:7], "g"), styles[5:7])
    unmixed = made(style_mixing=0.0)._mixed_styles(keys, label, "g")
    assert not (unmixed != unmixed[:, :1]).any()


def test_truncation_draws_styles_to_their_mean() -> None:
    family, keys = made().eval(), torch.arange(4)
    for step in range(3):
        family.g_loss(batch(), 8 * step)
        family.after_step(8 * step)
    mean = family.generator.mean_style
    assert mean.abs().sum() > 0.0
    whole = family.drawn_latents(keys)
    family.truncation = 0.5
    torch.testing.assert_close(family.drawn_latents(keys), mean + 0.5 * (whole - mean))
    family.truncation = 0.0
    torch.testing.assert_close(family.drawn_latents(keys), mean.expand(4, -1))


def test_the_mean_style_follows_all_styles_of_a_step() -> None:
    whole, cut = made(style_mixing=0.0), made(style_mixing=0.0)
    whole.g_loss(batch(), 0)
    for start in (0, 4):
        cut.g_loss(batch(4, start), 0)
    for family in (whole, cut):
        family.after_step(0)
    styles = whole._mixed_styles(batch()["key"], batch()["label"], "g")[:, 0]
    torch.testing.assert_close(whole.generator.mean_style, 0.005 * styles.mean(dim=0))
    torch.testing.assert_close(cut.generator.mean_style, whole.generator.mean_style)


def test_a_conditional_family_needs_labels() -> None:
    nothing = Surroundings(SIZE, 1, 0, 0, lambda run: made())
    with pytest.raises(ConfigError, match=r"family\.conditional: true; needs data with labels: set data\.num_classes"):
        StyleGAN2(StyleGAN2Config(conditional=True), nothing)
    assert made().conditions == ("label",)
    assert made(conditional=False).conditions == ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_references(name: str) -> None:
    # github.com/NVlabs/stylegan2-ada-pytorch, train.py: batch, minibatch-std group, gamma, lr, EMA kimg, ramp, layers
    wanted = {
        "auto": (32, 4, 0.0002 * 256**2 / 32, 0.0025, 10.0, 0.05, 2),  # 256 pixels on 2 workers
        "stylegan2": (32, 4, 10.0, 0.002, 10.0, None, 8),
        "paper256": (64, 8, 1.0, 0.0025, 20.0, None, 8),
        "paper512": (64, 8, 0.5, 0.0025, 20.0, None, 8),
        "paper1024": (32, 4, 2.0, 0.002, 10.0, None, 8),
        "cifar": (64, 32, 0.01, 0.0025, 500.0, 0.05, 2),
    }
    tree = preset_settings(name, 256, 2)
    family, train, optim = tree["family"], tree["train"], tree["optim"]["generator"]
    assert (
        tree["data"]["batch_size"],
        family["discriminator"]["minibatch_std_group"],
        family["objective"]["r1_gamma"],
        optim["lr"],
        train["ema_halflife_kimg"],
        train["ema_ramp"],
        family["generator"]["mapping_layers"],
    ) == wanted[name]
    assert optim["betas"] == [0.0, 0.99]


def test_auto_goes_by_size_and_workers() -> None:
    large = preset_settings("auto", 1024, 8)
    assert large["data"]["batch_size"] == 32
    assert large["optim"]["generator"]["lr"] == 0.002
    assert large["family"]["generator"]["channel_base"] == 32768
    assert preset_settings("auto", 32, 1)["data"]["batch_size"] == 32
    with pytest.raises(ConfigError, match=r"family\.preset: 'paper'; must be one of auto, stylegan2"):
        preset_settings("paper", 256, 1)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (StyleGAN2Config(truncation=1.5), "truncation: 1.5; must be from 0 to 1"),
        (StyleGAN2Config(style_mixing=-0.1), "style_mixing: -0.1; must be from 0 to 1"),
        (StyleGAN2Config(path_length=PathLengthConfig(every=0)), "path_length.every: 0; must be at least 1"),
        (StyleGAN2Config(path_length=PathLengthConfig(decay=0.0)), "path_length.decay: 0.0"),
    ],
)
def test_settings_that_cannot_be(config: StyleGAN2Config, problem: str) -> None:
    assert (config.problem(32) or "").startswith(problem)
    assert (
        dataclasses.replace(config, truncation=0.5, style_mixing=0.5, path_length=PathLengthConfig()).problem(32)
        is None
    )
    assert (StyleGAN2Config().problem(48) or "").startswith(
        "generator.channel_base: makes images whose sides are powers"
    )
