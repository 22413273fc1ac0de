"""What every family of the catalogue keeps to."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.families import CATALOGUE
from gmdist.families.conditioning import ConditioningConfig
from gmdist.families.cyclegan import CycleGAN
from gmdist.families.family import Batch, Condition, Family, conditioned_labels
from gmdist.families.gan import GAN
from gmdist.train.engine import freeze_all_but
from tests.support import CHANNELS, CLASSES, SIZE, SMALL, MemorySource, fit, make_trainer, small_family, tree_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", sorted(SMALL))]


def batch_on(device: torch.device, count: int = 8) -> Batch:
    return MemorySource(48, 8).first(count).batch_on(device)


def ready(name: str, device: torch.device) -> Family:
    """A family that has seen data once, with no branch at zero."""
    family = small_family(name).to(device)
    family.initialize(batch_on(device))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return family


def hashes(family: Family) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
        for name, tensor in [*family.named_parameters(), *family.named_buffers()]
    }


def test_is_tested_in_small(name: str) -> None:
    assert set(CATALOGUE) <= set(SMALL)
    assert type(SMALL[name]) is CATALOGUE[name.partition("/")[0]][1]


def test_losses_are_finite_and_reach_what_they_train(name: str, device: torch.device) -> None:
    family = ready(name, device)
    for phase in family.phases():
        freeze_all_but(family, phase.trains)
        loss, metrics = phase.loss(batch_on(device), 0)
        assert loss.shape == ()
        assert torch.isfinite(loss)
        assert torch.equal(metrics["loss"], loss.detach())
        assert not any(value.requires_grad for value in metrics.values())
        loss.backward()
        child = getattr(family, phase.trains)
        assert all(parameter.grad is not None for parameter in child.parameters())
        family.zero_grad()


def test_a_loss_is_the_mean_of_its_samples(name: str, device: torch.device) -> None:
    # What makes accumulation, and any number of workers, give the loss of the whole batch: each has every so many-th.
    family, batch = ready(name, device).eval(), batch_on(device)
    for phase in family.phases():
        whole = phase.loss(batch, 0)[0]
        halves = [phase.loss({key: t[i::2] for key, t in batch.items()}, 0)[0] for i in (0, 1)]
        torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-6)


def test_each_phase_changes_only_what_it_trains(name: str, device: torch.device, tmp_path: Path) -> None:
    trainer = make_trainer(small_family(name), tmp_path, device=device)
    try:
        loaded = trainer.data.first(8)
        for phase in trainer.phases:
            before = hashes(trainer.family)
            trainer.units[phase.trains].accumulate(phase, loaded.batch_on(trainer.device), 0, 1.0)
            trainer.units[phase.trains].step(1e-3)
            after = hashes(trainer.family)
            changed = {key.partition(".")[0] for key in before if before[key] != after[key]}
            assert changed & set(trainer.units) == {phase.trains}
    finally:
        trainer.close()


def test_samples(name: str, device: torch.device) -> None:
    family = ready(name, device).eval()
    if type(family).sample is Family.sample:
        with pytest.raises(ConfigError, match="draws none: use --translate"):
            family.sample(torch.arange(2))
        return
    keys = torch.tensor([3, 2**33, 17, 4], device=device)
    with torch.inference_mode():
        images = family.sample(keys)
        assert images.shape == (4, CHANNELS, SIZE, SIZE)
        assert images.dtype == torch.float32
        assert images.min() >= -1.0
        assert images.max() <= 1.0
        assert images.std() > 0.0
        # The same key gives the same image, whatever is drawn beside it.
        torch.testing.assert_close(family.sample(keys[1:3]), images[1:3], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(images[0], images[3])


def test_samples_follow_their_label(name: str, device: torch.device) -> None:
    family = ready(name, device).eval()
    if type(family).sample is Family.sample:
        pytest.skip("it draws no images")
    keys = torch.tensor([0, 1], device=device)
    labels = [torch.full((2,), label, device=device) for label in (0, 1)]
    with torch.inference_mode():
        first, second = (family.sample(keys, Condition(label)) for label in labels)
        torch.testing.assert_close(
            family.sample(keys), family.sample(keys, Condition(conditioned_labels(keys, None, CLASSES)))
        )
    assert torch.allclose(first, second) != ("label" in family.conditions)


def test_latents_are_places_of_images(name: str, device: torch.device) -> None:
    family, batch = ready(name, device).eval(), batch_on(device)
    with torch.inference_mode():
        latents, drawn = family.latents(batch), family.drawn_latents(batch["key"])
        if latents is not None:
            torch.testing.assert_close(family.from_latents(latents), family.reconstruct(batch))
        if drawn is not None:
            images = family.from_latents(drawn)
            assert images.shape == (8, CHANNELS, SIZE, SIZE)
            assert images.abs().max() <= 1.0
            one, other = drawn, drawn.roll(1, 0)
            torch.testing.assert_close(family.between(one, other, 0.0), one)
            torch.testing.assert_close(family.between(one, other, 1.0), other)
            assert not torch.allclose(family.from_latents(family.between(one, other, 0.5)), images)


def test_preview_and_evaluate(name: str, device: torch.device) -> None:
    family, batch = ready(name, device).eval(), batch_on(device)
    with torch.inference_mode():
        preview = family.preview(batch)
        metrics = family.summarize({name: mean.double().cpu() for name, mean in family.evaluate(batch).items()})
    assert preview.shape[:3] == (8, CHANNELS, SIZE)  # as wide as it likes
    assert preview.abs().max() <= 1.0
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_trains_and_shows_in_bf16(name: str, device: torch.device, tmp_path: Path) -> None:
    settings = {"num_steps": 1, "evaluate_every": 1, "sample_every": 1, "num_preview_images": 4}
    trainer = make_trainer(small_family(name), tmp_path, device=device, precision="bf16", **settings)
    trainer.test_data = MemorySource(8, 8)
    trainer.fit()
    trainer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "images" in line] == [0]
    assert any(key.startswith("test/") for key in lines[-1])


def test_what_is_encoded_is_of_each_image_alone(name: str, device: torch.device) -> None:
    family, batch = ready(name, device).eval(), batch_on(device)
    with torch.inference_mode():
        whole, part = family.encode(batch["image"]), family.encode(batch["image"][2:5])
    assert whole.keys() == part.keys()
    assert not set(whole) & {"image", "label", "caption", "key"}
    for key, encoded in whole.items():
        assert len(encoded) == 8
        torch.testing.assert_close(part[key], encoded[2:5], rtol=1e-3, atol=1e-4)


def test_resumes_bit_exactly(name: str, device: torch.device, tmp_path: Path) -> None:
    whole = fit(small_family(name), tmp_path / "whole", device=device)
    fit(small_family(name), tmp_path / "parts", device=device, num_steps=3)
    parts = fit(small_family(name, seed=0), tmp_path / "parts", device=device)
    assert parts == whole
    wanted = tree_bytes(tmp_path / "whole" / "checkpoints" / "step-00000006")
    assert tree_bytes(tmp_path / "parts" / "checkpoints" / "step-00000006") == wanted


def without_dropout(name: str) -> dict[str, ConditioningConfig]:
    """Of conditions, where the family has them."""
    conditioning = getattr(SMALL[name], "conditioning", None)
    if not isinstance(conditioning, ConditioningConfig):
        return {}
    return {"conditioning": dataclasses.replace(conditioning, dropout=1e-9)}  # of none, guidance is refused


def has_fallen(losses: list[float]) -> bool:
    return len(losses) >= 40 and sum(losses[-20:]) < 0.4 * sum(losses[:20])


def test_overfits_eight_images(name: str, device: torch.device, tmp_path: Path) -> None:
    if issubclass(CATALOGUE[name.partition("/")[0]][0], GAN | CycleGAN):
        pytest.skip("a game's losses need not fall: tests/families/test_gan.py")
    trainer = make_trainer(
        small_family(name, **without_dropout(name)),
        tmp_path,
        device=device,
        num_samples=8,
        num_steps=250,
        checkpoint_every=1000,
    )
    trainer.family.eval()  # dropout is there to prevent this
    losses: list[float] = []
    try:
        batches = trainer.data.batches(0)
        while trainer.step < 250 and not has_fallen(losses):
            trainer.train_step(next(batches))
            metrics = trainer._averages.reduce()
            losses.append(sum(value for key, value in metrics.items() if key.endswith("/loss")))
    finally:
        trainer.close()
    assert has_fallen(losses), (losses[:20], losses[-20:])
