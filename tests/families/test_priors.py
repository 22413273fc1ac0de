"""Priors: likelihoods by hand, codes that were made before, draws, and completions."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from gmdist.errors import ConfigError, DataError, DivergedError
from gmdist.families.code_sampler import CodeSamplerConfig
from gmdist.families.conditioning import ConditioningConfig, EncoderConfig
from gmdist.families.family import Batch, Condition
from gmdist.families.prior import Prior
from tests import support
from tests.support import CHANNELS, CLASSES, SIZE, SMALL, MemorySource, small_family

WITH_TOKENS = ["pixelcnn/tokens", "transformer_prior"]
PRIORS = ["pixelcnn", *WITH_TOKENS]
PLAIN = CodeSamplerConfig()


def prior(name: str, **changes: object) -> Prior:
    """One whose logits are far from each other."""
    family = small_family(name, **changes)
    assert isinstance(family, Prior)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in family.prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return family.eval()


def batch_of(count: int = 4) -> Batch:
    return MemorySource(48, 8).first(count).batch_on(torch.device("cpu"))


def log_probabilities(family: Prior, codes: Tensor, label: Tensor) -> Tensor:
    """Of each code [N, C, h, w]."""
    return family.prior(codes, label).log_softmax(dim=-1).gather(-1, codes[..., None])[..., 0]


@pytest.mark.parametrize("name", PRIORS)
def test_loss_score_and_evaluation_are_one_likelihood(name: str) -> None:
    family, batch = prior(name, conditioning=ConditioningConfig(dropout=1e-9)), batch_of()
    with torch.no_grad():
        logs = log_probabilities(family, family.coding.of_batch(batch), batch["label"])
        loss, metrics = family.loss(batch, 0)
        torch.testing.assert_close(loss, -logs.mean())
        assert torch.equal(metrics["loss"], loss)
        torch.testing.assert_close(family.scores(batch), {"log_likelihood": logs.sum(dim=(1, 2, 3))})
        found = family.evaluate(batch)
    torch.testing.assert_close(found["loss"], loss)
    assert ("bits_per_dim" in found) == (name == "pixelcnn")


def test_tokens_are_those_of_a_cache_in_autocast_too() -> None:
    coding, image = prior("transformer_prior").coding, batch_of(48)["image"]
    with torch.autocast("cpu", torch.bfloat16):
        found = coding.of_images(image)
    assert torch.equal(found, coding.of_images(image))


def test_bits_per_dimension_by_hand() -> None:
    # A network that says nothing takes 8 bits for each of 256 levels; one that knows a bit of each, 7.
    family = small_family("pixelcnn")
    assert isinstance(family, Prior)
    batch = batch_of() | {"image": torch.full((4, CHANNELS, SIZE, SIZE), 100 / 127.5 - 1.0)}
    with torch.no_grad():
        for parameter in family.prior.parameters():
            parameter.zero_()
        assert family.evaluate(batch)["bits_per_dim"].item() == pytest.approx(8.0, rel=1e-6)
        family.prior.out[0].bias[128:] = -1e9
        assert family.evaluate(batch)["bits_per_dim"].item() == pytest.approx(7.0, rel=1e-6)
        nats = family.scores(batch)["log_likelihood"]
    assert nats.tolist() == pytest.approx([-7.0 * math.log(2.0) * CHANNELS * SIZE * SIZE] * 4, rel=1e-6)


def test_every_level_of_a_pixel_comes_back() -> None:
    family = small_family("pixelcnn")
    assert isinstance(family, Prior)
    levels = torch.arange(256).view(1, 1, 16, 16)
    images = family.coding.shown(levels)
    assert images.min() == -1.0
    assert images.max() == 1.0
    assert torch.equal(family.coding.of_images(images), levels)
    assert torch.equal(family.coding.of_images(levels.float().mul(1 / 127.5).sub(1.0)), levels)  # as loaders have it


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_tokens_that_were_made_before_are_those_of_the_images(name: str) -> None:
    family, batch = prior(name), batch_of()
    assert family.cached == ("tokens",)
    tokens = family.coding.tokenizer.encode(batch["image"])["tokens"]
    cached = {"tokens": tokens.int(), "label": batch["label"], "key": batch["key"]}
    family.initialize(cached)
    assert torch.equal(family.loss(cached, 0)[0], family.loss(batch, 0)[0])
    assert torch.equal(family.scores(cached)["log_likelihood"], family.scores(batch)["log_likelihood"])
    for value in (-1, 16):
        tokens[1, 2, 3] = value
        with pytest.raises(DataError, match=f"'tokens.npy'; holds the code {value}, and those of tokens are 0 to 15"):
            family.loss(cached | {"tokens": tokens.int()}, 0)
    with pytest.raises(ConfigError, match=r"they are int32 \[4, 3\], and those of tokens are integers \[4, 4\]"):
        family.initialize(cached | {"tokens": tokens[:, :, :3].int()})
    with pytest.raises(ConfigError, match=r"they are float16 \[4, 4\]"):
        family.initialize(cached | {"tokens": tokens.half()})


def test_pixels_have_no_cache() -> None:
    assert small_family("pixelcnn").cached == ()


@pytest.mark.parametrize("name", PRIORS)
def test_draws_follow_the_likelihood(name: str) -> None:
    # The first code of many keys, beside its distribution.
    family, count = prior(name, sampler=PLAIN), 3000
    seen = []

    def draw(codes: Tensor, given_rows: int, label: Tensor, choose) -> Tensor:
        seen.append(choose(family.prior(codes[:1], label[:1])[:, 0, 0, 0].expand(count, -1), 0))
        return codes

    label = torch.ones(count, dtype=torch.int64)
    with torch.no_grad():
        expected = family.prior(torch.zeros(1, *family.coding.shape, dtype=torch.int64), label[:1])[0, 0, 0, 0]
        family.prior.draw = draw
        family.sample(torch.arange(count), Condition(label))
    frequencies = seen[0].bincount(minlength=family.coding.num_codes) / count
    assert (frequencies - expected.softmax(dim=0)).abs().max() < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_one_draws_without_the_free_network_and_more_leads_away(name: str) -> None:
    keys, label = torch.arange(3), torch.tensor([0, 1, 2])

    def images(guidance: float) -> Tensor:
        with torch.no_grad():
            return prior(name, sampler=CodeSamplerConfig(guidance=guidance)).sample(keys, Condition(label))

    plain = images(1.0)
    assert torch.equal(images(1.0 + 1e-9), plain)  # two networks that are led by one
    assert not torch.equal(images(4.0), plain)
    free = torch.full_like(label, CLASSES)
    with torch.no_grad():
        assert torch.equal(images(0.0), prior(name, sampler=PLAIN).sample(keys, Condition(free)))


@pytest.mark.parametrize("name", PRIORS)
def test_the_most_probable_code_needs_no_number(name: str) -> None:
    family = prior(name, sampler=CodeSamplerConfig(top_k=1))
    with torch.no_grad():
        images = family.sample(torch.arange(3), Condition(torch.ones(3, dtype=torch.int64)))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_without_classes(name: str) -> None:
    family, batch = prior(name, conditioning=ConditioningConfig("none"), sampler=PLAIN), batch_of()
    assert (family.inputs, family.conditions) == (("image",), ())
    assert prior(name).conditions == ("label",)
    with torch.no_grad():
        assert torch.equal(family.evaluate(batch)["loss"], family.loss(batch, 0)[0])
        assert family.sample(torch.arange(2)).shape == (2, CHANNELS, SIZE, SIZE)


@pytest.mark.parametrize("name", PRIORS)
def test_data_without_labels_are_scored_without_a_class(name: str) -> None:
    family, batch = prior(name), batch_of()
    free = batch | {"label": torch.full_like(batch["label"], CLASSES)}
    del batch["label"]
    with torch.no_grad():
        assert torch.equal(family.scores(batch)["log_likelihood"], family.scores(free)["log_likelihood"])
        always_told = prior(name, conditioning=ConditioningConfig(dropout=0.0), sampler=PLAIN)
        with pytest.raises(ConfigError, match=r"family.conditioning.dropout: 0.0; a model that was always told the cl"):
            always_told.scores(batch)


# Completion


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("given", [4, 10])
def test_a_completion_keeps_whole_rows_of_codes(name: str, given: int) -> None:
    family, image = prior(name, sampler=PLAIN), batch_of(1)["image"]
    rows, keys = image[:, :, :given].expand(3, -1, -1, -1), torch.tensor([5, 2**33, 6])
    with torch.no_grad():
        whole = family.complete(rows, keys)
        codes, expected = family.coding.of_images(whole), family.coding.of_images(image)
        kept = given if name == "pixelcnn" else given // 4
        assert torch.equal(codes[:, :, :kept], expected[:, :, :kept].expand(3, -1, -1, -1))
        assert not torch.equal(codes[0, :, kept:], codes[1, :, kept:])
        assert torch.equal(family.complete(rows[:1], keys[1:2]), whole[1:2])
        assert not torch.equal(family.complete(rows, keys, Condition(torch.full((3,), 3))), whole)


@pytest.mark.parametrize("name", PRIORS)
def test_rows_that_give_nothing_or_all_are_refused(name: str) -> None:
    family, keys = prior(name), torch.arange(1)
    least = 1 if name == "pixelcnn" else 4
    for height, width in ((least - 1, SIZE), (SIZE, SIZE), (8, SIZE - 1)):
        words = f"^{width}x{height} pixels; must be 16 wide, and from {least} to 15 high"
        with pytest.raises(ConfigError, match=words):
            family.complete(torch.zeros(1, CHANNELS, height, width), keys)


def test_families_that_draw_whole_images_complete_none() -> None:
    with pytest.raises(ConfigError, match="draws images as a whole, and completes none"):
        small_family("ddpm").complete(torch.zeros(1, CHANNELS, 8, SIZE), torch.arange(1))


# What is refused


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_a_first_stage_that_is_no_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="family.first_stage: first is not a run of a tokenizer"):
        small_family(name, first_stage="first")


@pytest.mark.parametrize("name", PRIORS)
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    def problem(**changes: object) -> str | None:
        return dataclasses.replace(SMALL[name], **changes).problem(SIZE)

    assert problem() is None
    assert problem(sampler=CodeSamplerConfig(top_p=2.0)) == (
        "sampler.top_p: 2.0; must be above 0, where no code would be left, and at most 1, their sum"
    )
    assert str(problem(conditioning=ConditioningConfig("text"))).startswith("conditioning.kind: 'text'; a prior reads")
    unread = ConditioningConfig(text=EncoderConfig("clip", "some/folder"))
    assert str(problem(conditioning=unread)).startswith("conditioning.text: EncoderConfig(name='clip', path='some/fold")
    assert str(problem(conditioning=ConditioningConfig(dropout=2.0))).startswith("conditioning.dropout: 2.0")


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_by_what_was_never_trained_is_refused(name: str) -> None:
    always_told = ConditioningConfig(dropout=0.0)
    for guidance in (0.0, 3.0):
        words = f"family.sampler.guidance: {guidance}; must be 1, or family.conditioning.dropout above 0"
        with pytest.raises(ConfigError, match=words):
            small_family(name, conditioning=always_told, sampler=CodeSamplerConfig(guidance=guidance))
    small_family(name, conditioning=always_told, sampler=PLAIN)
    with pytest.raises(ConfigError, match=r"family.sampler.guidance: 3.0; must be 1, or data.num_classes be set"):
        small_family(name, conditioning=ConditioningConfig("none"), sampler=CodeSamplerConfig(guidance=3.0))


def test_a_tokenizer_that_is_not_finite_gives_no_likelihoods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "PatchMeans", lambda config, surroundings: small_family("vq_vae"))
    family, batch = small_family("transformer_prior").eval(), MemorySource(16, 8).first(8).batch
    with torch.no_grad():
        family.coding.tokenizer.autoencoder["encoder"][0].bias[0] = torch.nan
    for look in (family.initialize, family.evaluate, family.scores):
        with pytest.raises(DivergedError, match=r"no codes: the output of encoder\.0 is not finite"):
            look(batch)
