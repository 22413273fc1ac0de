"""What a denoiser is told: classes, captions, nothing; and how it does without."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.errors import ConfigError
from gmdist.families.conditioning import Conditioner, ConditioningConfig, EncoderConfig
from gmdist.families.ddpm import DDPM
from gmdist.families.family import Batch, Condition, Family, Surroundings
from gmdist.nets.dit import DiTConfig
from gmdist.nets.text import TextConfig
from tests.support import CHANNELS, CLASSES, SIZE, SMALL, small_family

TEXT = ConditioningConfig("text", 0.5, EncoderConfig(transformer=TextConfig(16, 1, 2, max_length=8)))
LONG = "a cat and a dog and a bird"
WORDS = ("cat", "dog", "", "caterpillar")


def surroundings(num_classes: int = CLASSES) -> Surroundings:
    return Surroundings(SIZE, CHANNELS, num_classes, 0, lambda run: pytest.fail(run))


def captions_of(texts: tuple[str, ...]) -> Tensor:
    rows = [list(text.encode()) for text in texts]
    longest = max(map(len, rows))
    return torch.from_numpy(np.array([row + [0] * (longest - len(row)) for row in rows], np.uint8))


def batch_of(texts: tuple[str, ...]) -> Batch:
    keys = torch.arange(len(texts))
    image = torch.linspace(-1, 1, CHANNELS * SIZE * SIZE).view(1, CHANNELS, SIZE, SIZE).expand(len(texts), -1, -1, -1)
    return {"image": image.clone(), "label": keys % CLASSES, "key": keys, "caption": captions_of(texts)}


def move_off_zero(family: Family) -> None:
    """Leave no branch at zero, where it would compute nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def guide(family: DDPM, guidance: float) -> None:
    """Set the strength of the guidance: of this family alone, for SMALL's configs are those of all tests."""
    config = family.diffusion.config
    sampler = dataclasses.replace(config.sampler, guidance=guidance)
    family.diffusion.config = dataclasses.replace(config, sampler=sampler)


def text_family(**changes: object) -> DDPM:
    family = small_family("ddpm", conditioning=TEXT, **changes)
    assert isinstance(family, DDPM)
    move_off_zero(family)
    return family.eval()


def test_captions_condition_the_loss_and_reach_the_encoder_that_is_trained_along() -> None:
    family = text_family()
    assert family.inputs == ("image", "caption")
    batch = batch_of(WORDS)
    loss, _ = family.loss(batch, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in family.denoiser.parameters())
    with torch.no_grad():
        with_words = family.evaluate(batch)["loss"]
        with_others = family.evaluate(batch | {"caption": captions_of(("dog", "cat", "", "x"))})["loss"]
    assert with_words != with_others


def test_prompts_make_the_images_and_the_empty_one_is_no_prompt() -> None:
    family = text_family()
    keys = torch.tensor([5, 5, 5, 5])
    with torch.inference_mode():
        images = family.sample(keys, Condition(prompts=("cat", "cat", "dog", "")))
        unasked = family.sample(keys)
    torch.testing.assert_close(images[0], images[1])
    assert not torch.allclose(images[0], images[2])
    torch.testing.assert_close(images[3], unasked[0])


def test_without_guidance_nothing_else_is_computed_and_guidance_of_zero_forgets_the_prompt() -> None:
    family = text_family()
    keys = torch.arange(3)
    prompts = Condition(prompts=("cat", "dog", "cow"))
    with torch.inference_mode():
        guide(family, 0.0)
        free = family.sample(keys, prompts)
        guide(family, 1.0)
        torch.testing.assert_close(family.sample(keys), free, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(family.sample(keys, prompts), free)


@pytest.mark.parametrize(("guidance", "size"), [(1.0, 3), (2.0, 6)])
def test_guidance_takes_one_pass_of_both(guidance: float, size: int) -> None:
    family = text_family()
    guide(family, guidance)
    sizes: list[int] = []
    family.denoiser.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        family.sample(torch.arange(3), Condition(prompts=("cat", "dog", "cow")))
    assert sizes == [size] * 4


def test_conditions_are_dropped_by_the_samples_number() -> None:
    keys = torch.arange(4000)
    label = keys % CLASSES
    conditioner = Conditioner(ConditioningConfig(dropout=0.25), surroundings())
    told = conditioner.of_training({"key": keys, "label": label}).label
    assert told is not None
    assert abs((told == CLASSES).double().mean() - 0.25) < 0.03
    assert torch.equal(told[told != CLASSES], label[told != CLASSES])
    some = torch.tensor([17, 3, 999])
    again = conditioner.of_training({"key": some, "label": label[some]}).label
    assert torch.equal(again, told[some])

    told_text = Conditioner(TEXT, surroundings()).of_training(batch_of(WORDS * 100)).tokens
    assert told_text is not None
    nothing = Conditioner(TEXT, surroundings()).nothing(1, torch.device("cpu"))
    assert nothing is not None
    is_empty = (told_text == nothing.tokens).all(dim=1)
    assert abs(is_empty.double().mean() - 0.625) < 0.08  # one in four is empty anyway, half of the others are dropped


def test_a_long_prompt_is_cut_with_a_warning_and_a_long_caption_without(caplog: pytest.LogCaptureFixture) -> None:
    conditioner = Conditioner(TEXT, surroundings())
    with caplog.at_level(logging.WARNING):
        conditioner.of_training(batch_of((*WORDS, LONG)))
        assert not caplog.records
        conditioner.of_request(torch.arange(3), Condition(prompts=(LONG, LONG, "cat")))
    assert [record.getMessage() for record in caplog.records] == [
        f"a prompt is cut to the 8 tokens that the encoder takes: {LONG}"
    ]


def test_classes_can_be_left_out_where_the_data_has_them() -> None:
    family = small_family("ddpm", conditioning=ConditioningConfig("none"))
    assert family.inputs == ("image",)
    assert family.denoiser.network.label is None
    family.loss(batch_of(WORDS), 0)


def test_a_transformer_can_take_the_place_of_the_unet() -> None:
    dit = DiTConfig(channels=16, depth=2, num_heads=2, patch_size=4, qk_norm=True)
    for name in ("ddpm", "latent_diffusion"):
        family = small_family(name, network="dit", dit=dit).eval()
        move_off_zero(family)
        loss, _ = family.loss(batch_of(WORDS), 0)
        loss.backward()
        for key, parameter in family.denoiser.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key
        with torch.inference_mode():
            assert family.sample(torch.arange(2)).shape == (2, CHANNELS, SIZE, SIZE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"conditioning": ConditioningConfig("caption")},
            "conditioning.kind: 'caption'; must be one of none, class, te",
        ),
        ({"conditioning": ConditioningConfig(dropout=float("nan"))}, "conditioning.dropout: nan; must be at least 0"),
        (
            {"conditioning": ConditioningConfig(text=EncoderConfig("t5"))},
            "conditioning.text.name: 't5'; must be one of",
        ),
        (
            {"conditioning": ConditioningConfig(text=EncoderConfig("clip"))},
            "conditioning.text.path: None; must be given",
        ),
        (
            {"conditioning": ConditioningConfig("class", 0.0)},  # guidance is 2
            "diffusion.sampler.guidance: 2.0; must be 1, or family.conditioning.dropout above 0",
        ),
        (
            {"conditioning": dataclasses.replace(TEXT, dropout=0.0)},
            "diffusion.sampler.guidance: 2.0; must be 1, or family.conditioning.dropout above 0",
        ),
        (
            {"conditioning": ConditioningConfig(dropout=1.0)},
            "conditioning.dropout: 1.0; must be at least 0 and below 1",
        ),
        ({"network": "dit", "conditioning": TEXT}, "network: 'dit'; attends to no captions"),
        ({"network": "transformer"}, "network: 'transformer'; must be one of unet, dit"),
        ({"network": "dit", "dit": DiTConfig(patch_size=3)}, "dit.patch_size: the network needs image sides divisible"),
        (
            {"unet": dataclasses.replace(SMALL["ddpm"].unet, context_channels=4)},
            "unet.context_channels: 4; is for captions",
        ),
        (
            {"unet": dataclasses.replace(SMALL["ddpm"].unet, vector_channels=4)},
            "unet.vector_channels: 4; must be null",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], words: str) -> None:
    problem = dataclasses.replace(SMALL["ddpm"], **changes).problem(SIZE)
    assert problem is not None
    assert problem.startswith(words)


@pytest.mark.parametrize("conditioning", [ConditioningConfig(), TEXT])
def test_models_that_are_always_told_their_condition_are_not_guided(conditioning: ConditioningConfig) -> None:
    always_told = dataclasses.replace(SMALL["ddpm"], conditioning=dataclasses.replace(conditioning, dropout=0.0))
    with pytest.raises(
        ConfigError, match=r"^family.diffusion.sampler.guidance: 2.0; must be 1, or family.conditioning"
    ):
        DDPM(always_told, surroundings())
    diffusion = dataclasses.replace(SMALL["ddpm"].diffusion, sampler=SamplerConfig(num_steps=4))
    DDPM(dataclasses.replace(always_told, diffusion=diffusion), surroundings())


@pytest.mark.parametrize("kind", ["none", None])
def test_guidance_of_a_model_that_is_told_nothing_has_no_effect(kind: str | None) -> None:
    config = dataclasses.replace(SMALL["ddpm"], conditioning=ConditioningConfig(kind, 0.0))
    family = DDPM(config, surroundings(num_classes=0)).eval()
    move_off_zero(family)
    with torch.inference_mode():
        guided = family.sample(torch.arange(3))
        guide(family, 1.0)
        assert torch.equal(family.sample(torch.arange(3)), guided)


def test_a_text_is_read_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    family = small_family("ddpm/text").eval()
    read = []
    monkeypatch.setattr(
        family.denoiser.text,
        "forward",
        lambda tokens, real=family.denoiser.text.forward: (read.append(tokens.tolist()), real(tokens))[1],
    )
    with torch.no_grad():
        family.sample(torch.arange(2), Condition(prompts=("a cat", "a dog")))
    assert len(read) == 2  # the texts, and none for guidance


def test_latents_are_not_predicted_by_a_division_by_almost_nothing() -> None:
    latents, cosine = SMALL["latent_diffusion"], DiffusionConfig("cosine", sampler=SamplerConfig(guidance=2.0))
    problem = dataclasses.replace(latents, diffusion=cosine).problem(SIZE)
    assert problem is not None
    assert problem.startswith("diffusion.prediction: 'eps'; the sampler's first step makes its errors 632 times as")
    leading = dataclasses.replace(cosine.sampler, spacing="leading")
    for better in (dataclasses.replace(cosine, prediction="v"), dataclasses.replace(cosine, sampler=leading)):
        assert dataclasses.replace(latents, diffusion=better).problem(SIZE) is None
    # Pixels have bounds, which hold whatever comes of it.
    assert dataclasses.replace(SMALL["ddpm"], diffusion=cosine).problem(SIZE) is None


def test_a_context_of_another_width_than_the_encoders_is_refused() -> None:
    unet = dataclasses.replace(SMALL["ddpm"].unet, context_channels=4)
    with pytest.raises(ConfigError, match=r"family.unet.context_channels: 4; the captions' encoder has 16"):
        small_family("ddpm", conditioning=TEXT, unet=unet)


def test_classes_need_labels() -> None:
    with pytest.raises(ConfigError, match=r"family.conditioning.kind: 'class'; needs data.num_classes"):
        Conditioner(ConditioningConfig("class"), surroundings(num_classes=0))
