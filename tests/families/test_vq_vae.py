"""The VQ-VAE on several workers as on one, at every stage; its loss by formula, its start, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gmdist.errors import DataError, DivergedError
from gmdist.families.codes import tables_of_codes
from gmdist.families.vit_vqvae import ViTVQVAE
from gmdist.families.vq_vae import VQVAE, VQVAEConfig
from gmdist.nets.quantizer import QuantizerConfig
from gmdist.train.optim import OptimConfig
from tests.support import MemorySource, make_trainer, run_workers, small_family
from tests.train import parity
from tests.train.parity import WORLD

CODES, BATCH = 16, 8
STAGES = (0, 1, 2, 3)
MICRO_BATCH = 2
PRECISIONS = ("fp32", "bf16")
SGD = OptimConfig("sgd", lr=1e-2, momentum=0.9)
# Codes that are used less than others die at once.
AVERAGED = QuantizerConfig(CODES, decay=0.6, dead_below=0.8, revive=True)
LEARNED = QuantizerConfig(CODES, code_channels=4, normalize=True, learned_by="gradient", estimator="rotation")


def made(learned_by: str = "averages") -> VQVAE:
    family = small_family("vq_vae", quantizer=dataclasses.replace(AVERAGED if learned_by == "averages" else LEARNED))
    family.initialize(MemorySource(48, BATCH).first(48).batch)
    family.local = False  # its loss is a mean over samples
    return family


def averaged() -> VQVAE:
    return made("averages")


def learned() -> VQVAE:
    return made("gradient")


def of_vit() -> ViTVQVAE:
    codebook = dataclasses.replace(AVERAGED, code_channels=4, normalize=True)
    family = small_family("vit_vqvae", quantizer=codebook)
    family.initialize(MemorySource(48, BATCH).first(48).batch)
    family.local = False
    return family


def case_name(kind: str, precision: str, stage: int) -> str:
    return f"{kind}-{precision}-{stage}"


def train_all(rank: int, world: int, folder: str) -> None:
    for make in (averaged, learned, of_vit):
        for precision in PRECISIONS:
            for stage in STAGES:
                name = case_name(make.__name__, precision, stage)
                settings = {"precision": precision, "zero_stage": stage, "micro_batch_size": MICRO_BATCH, "optim": SGD}
                parity.train(rank, folder, name, make, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("vq")
    run_workers(train_all, WORLD, str(folder))
    return folder


def alone(make, folder: Path, precision: str) -> dict[str, Tensor]:
    """What one worker has after the same steps on whole batches."""
    # In parts of the same size: in bf16 a convolution rounds otherwise where more samples pass at once.
    settings = {"num_steps": parity.STEPS, "precision": precision, "micro_batch_size": MICRO_BATCH}
    trainer = make_trainer(make(), folder, batch_size=BATCH, optim=SGD, **settings)
    batches = trainer.data.batches(0)
    for _ in range(parity.STEPS):
        trainer.train_step(next(batches))
    buffers = {name: buffer.clone() for name, buffer in trainer.family.named_buffers()}
    fragments = {f.name: f.values.clone() for unit in trainer.units.values() for f in unit.held()}
    trainer.close()
    return buffers | fragments


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [averaged, learned, of_vit])
def test_workers_have_the_codebook_of_one(trained: Path, tmp_path: Path, make, precision: str, stage: int) -> None:
    found = parity.load(trained, case_name(make.__name__, precision, stage))
    expected = alone(make, tmp_path, precision)
    names = [name for name in expected if "codebook" in name]
    assert len(names) == (3 if make is learned else 5)
    for name in names:
        worst = (found[name].flatten() - expected[name].flatten()).abs().max()
        largest = max(1.0, float(expected[name].abs().max()))  # of sums, several: fp32 rounds those to 1e-6 and less
        assert worst < 1e-6 * largest, (name, float(worst), largest)


def test_in_these_steps_codes_are_revived(tmp_path: Path) -> None:
    def without() -> VQVAE:
        family = averaged()
        family.config.quantizer.revive = False
        return family

    name = "autoencoder.quantizer.codebook.sums"
    revived, left = alone(averaged, tmp_path / "with", "fp32"), alone(without, tmp_path / "without", "fp32")
    assert (revived[name] - left[name]).abs().amax(dim=1).gt(1e-3).any()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("make", [averaged, learned])
def test_parity_with_torch(trained: Path, make, stage: int) -> None:
    *_, expected = parity.reference(make, SGD)
    found = parity.load(trained, case_name(make.__name__, "fp32", stage))
    assert parity.worst(found, expected, make().state_dict()) < 1e-4


def test_the_loss_by_formula() -> None:
    family = averaged().double()
    source = MemorySource(48, BATCH)
    torch.testing.assert_close(family.image_variance, source.first(48).batch["image"].double().var(correction=0))
    batch = source.first(BATCH).batch
    image = batch["image"].double()
    loss, metrics = family.loss(batch | {"image": image}, 0)
    features = family.autoencoder["encoder"](image).movedim(1, -1)
    codes = family.quantizer.codebook()
    chosen = codes[torch.cdist(features.flatten(0, 2), codes).argmin(1)].view_as(features)
    image_made = family.autoencoder["decoder"](chosen.movedim(-1, 1))
    mse = (image_made - image).square().mean()
    commitment = (features - chosen).square().mean()
    torch.testing.assert_close(loss, mse / family.image_variance + 0.25 * commitment)
    torch.testing.assert_close(metrics["commitment"], commitment.detach())


def test_the_start_is_where_the_features_are() -> None:
    family = averaged()
    features = family.autoencoder["encoder"](MemorySource(48, BATCH).first(48).batch["image"]).movedim(1, -1)
    codes = family.quantizer.codebook()
    distance = torch.cdist(features.flatten(0, 2), codes).amin(1)
    assert distance.square().mean() < 0.5 * features.var(dim=(0, 1, 2)).sum()
    assert all(torch.equal(one, other) for one, other in zip(family.buffers(), averaged().buffers(), strict=True))


def test_fewer_features_than_codes_are_refused() -> None:
    family = small_family("vq_vae", quantizer=QuantizerConfig(33))
    batch = MemorySource(48, BATCH).first(2).batch
    message = r"32 features of 2 samples are too few for k-means of 33 codes; set .*kmeans_steps=0.* at least 3 samples"
    with pytest.raises(DataError, match=message):
        family.initialize(batch)
    small_family("vq_vae", quantizer=QuantizerConfig(33, kmeans_steps=0)).initialize(batch)


def test_images_of_one_color_are_refused() -> None:
    batch = MemorySource(48, BATCH).first(8).batch
    with pytest.raises(DataError, match="the first 8 images have one color"):
        small_family("vq_vae").initialize(batch | {"image": torch.zeros_like(batch["image"])})


@pytest.mark.parametrize(("layer", "where"), [("0", "encoder.0"), ("4.conv2", "encoder.4.conv2")])
def test_what_is_not_finite_gets_no_code(layer: str, where: str) -> None:
    family, batch = averaged(), MemorySource(48, BATCH).first(8).batch
    with torch.no_grad():
        family.autoencoder["encoder"].get_submodule(layer).bias[0] = torch.nan
    for look in (family.initialize, family.reconstruct, family.evaluate, lambda part: family.encode(part["image"])):
        with pytest.raises(DivergedError, match=f"no codes: the output of {where} is not finite"):
            look(batch)


def test_a_decoder_that_is_not_finite_says_nothing_of_the_codes() -> None:
    family, batch = averaged(), MemorySource(48, BATCH).first(8).batch
    with torch.no_grad():
        next(family.autoencoder["decoder"].parameters())[0] = torch.nan
        assert family.reconstruct(batch).isnan().any()
    assert family.encode(batch["image"])["tokens"].shape == (8, *family.token_shape)


@pytest.mark.parametrize("part", ["project_in", "codebook"])
def test_a_quantizer_that_is_not_finite_gives_no_code(part: str) -> None:
    family = made("gradient")
    with torch.no_grad():
        next(family.quantizer.get_submodule(part).parameters())[0] = torch.nan
    with pytest.raises(DivergedError, match=f"no codes: the output of quantizer.{part} is not finite"):
        family.encode(MemorySource(48, BATCH).first(8).batch["image"])


def test_reconstructions_are_compared_in_fp32_where_weights_are_bf16() -> None:
    family, batch = averaged(), MemorySource(48, BATCH).first(8).batch
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image = family.reconstruct(batch)
        found = family.evaluate(batch | {"image": image})
        assert image.dtype == found["ssim"].dtype == torch.float32
        same = family.compared_with(image, image)
    assert same["ssim"] == pytest.approx(1.0, abs=1e-5)


def test_an_evaluation_sees_the_codes_of_all_images(tmp_path: Path) -> None:
    messages: list[str] = []
    trainer = make_trainer(averaged(), tmp_path, num_steps=1, evaluate_every=1, micro_batch_size=8)
    trainer.hooks.on_message = messages.append
    trainer.fit()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    with trainer.ema.applied(), torch.no_grad():
        tokens = trainer.family.tokens(MemorySource(48, BATCH).first(48).batch["image"])
    trainer.close()
    shares = torch.bincount(tokens.flatten(), minlength=CODES) / tokens.numel()
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    assert line["test/perplexity"] == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert line["test/used_codes"] == pytest.approx(float((shares > 0).float().mean()))
    assert {"test/mse", "test/psnr_db", "test/ssim"} < set(line)
    assert not messages


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "revive=true, with a lower family.quantizer.decay, or fewer .*normalize=true$"),
        ({"revive": True}, "set a lower family.quantizer.decay or a higher family.quantizer.dead_below, or fewer"),
        ({"learned_by": "gradient", "normalize": True}, "learned_by=averages with .*revive=true, or .*code_channels$"),
    ],
)
def test_a_collapse_is_warned_of_with_what_is_left_to_set(settings: dict[str, object], advice: str) -> None:
    family = small_family("vq_vae", quantizer=QuantizerConfig(CODES, **settings))
    (concern,) = family.concerns({"perplexity": 1.5, "used_codes": 0.125})
    assert concern.startswith("the codebook has collapsed: 12% of its 16 codes are used, and as unevenly as 1.5; set ")
    assert re.search(advice, concern)
    assert family.concerns({"perplexity": 9.0, "used_codes": 0.9}) == family.concerns({}) == []


def test_the_table_of_codes_is_what_tokens_stand_for() -> None:
    tokens = torch.arange(CODES).view(1, 4, 4)
    for family in (averaged(), learned()):
        tables = tables_of_codes(family)
        assert list(tables) == ["autoencoder.quantizer.codebook.codes"]
        found = family.quantizer.project_out(tables["autoencoder.quantizer.codebook.codes"][tokens])
        assert torch.equal(found, family.quantizer.lookup(tokens))


def survive(rank: int, world: int, folder: str) -> None:
    family = small_family("vq_vae", quantizer=QuantizerConfig(CODES, decay=0.9, revive=True))
    trainer = make_trainer(
        family, Path(folder), precision="bf16", zero_stage=2, num_steps=250, log_every=50, checkpoint_every=250
    )
    trainer.fit()
    trainer.close()
    line = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["codebook/perplexity"] > 0.5 * CODES
    assert line["codebook/dead_share"] < 0.1
    tokens = trainer.family.double().tokens(MemorySource(48, BATCH).first(48).batch["image"].double())
    assert tokens.unique().numel() > 0.8 * CODES


def test_a_codebook_survives_training_in_bf16(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_workers(survive, 1, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VQVAEConfig(feature_channels=0), "feature_channels: 0; must be from 1 to 65536"),
        (VQVAEConfig(quantizer=QuantizerConfig(1)), "quantizer.codebook_size: 1; must be from 2"),
        (VQVAEConfig(), "network.channels: image sides must be divisible by 4, not 30"),
        (
            VQVAEConfig(quantizer=QuantizerConfig(16_385)),
            "quantizer.codebook_size: 16385; must be at most 16384, as k-means starts from the 64 features each of",
        ),
    ],
)
def test_refusals(config: VQVAEConfig, message: str) -> None:
    assert VQVAEConfig().problem(32) is None
    assert VQVAEConfig(quantizer=QuantizerConfig(16_384)).problem(32) is None
    assert VQVAEConfig(quantizer=QuantizerConfig(16_385, kmeans_steps=0)).problem(32) is None
    problem = config.problem(32 if config != VQVAEConfig() else 30)
    assert problem is not None
    assert problem.startswith(message)
