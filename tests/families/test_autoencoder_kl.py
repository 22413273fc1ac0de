"""The first stage's loss against its published formula in float64, and what its two networks keep from each other."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist import rng
from gmdist.errors import ConfigError, DivergedError
from gmdist.families.adversarial import DiscriminatorConfig
from gmdist.families.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from gmdist.families.family import Batch, Family
from gmdist.nets import perceptual
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.perceptual import PerceptualConfig
from gmdist.train.checkpoint import read_meta
from gmdist.train.engine import freeze_all_but
from gmdist.train.optim import OptimConfig
from tests.nets.vgg import WIDTHS, linear_state, vgg_state
from tests.support import CHANNELS, SIZE, MemorySource, fit, make_trainer, run_workers, small_family, tree_bytes
from tests.train import parity
from tests.train.parity import WORLD

START = 16  # images
JUDGED = DiscriminatorConfig(8, 1, weight=0.7, start_images=START)


def family_with(discriminator: DiscriminatorConfig | None = JUDGED, seed: int = 0, **changes) -> AutoencoderKL:
    """In float64, with a log-variance and a posterior that are not where they start."""
    family = small_family("autoencoder_kl", seed, kl_weight=0.02, discriminator=discriminator, **changes).double()
    with torch.no_grad():
        if family.autoencoder.logvar is not None:
            family.autoencoder.logvar.fill_(-0.8)
        family.autoencoder.encoder.quant.bias += torch.tensor([0.1, -0.2, -1.0, 0.4])
    return family


def batch_of(count: int = 8) -> Batch:
    batch = MemorySource(48, 8).first(count).batch
    return batch | {"image": batch["image"].double()}


def reference_terms(family: AutoencoderKL, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """nll, KL and adversarial loss as the published code sums them: over all elements, by the number of samples."""
    image, net = batch["image"], family.autoencoder
    mean, logvar = net.encoder(image)
    deviation = (logvar / 2).exp()
    noise = rng.normal(family.seed, "posterior", batch["key"], family.latent_shape).double()
    made = net.decoder(mean + deviation * noise)
    rec = (image - made).abs()
    if family.perceptual is not None:
        rec = rec + family.config.perceptual.weight * family.perceptual(made, image)[:, None, None, None]
    s = torch.zeros(()).double() if net.logvar is None else net.logvar
    nll = (rec / s.exp() + s).sum() / len(image)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0)).sum() / len(image)
    adversarial = -family.discriminator(made).mean() if family.discriminator is not None else torch.zeros(())
    return nll, kl, adversarial


def gradients(loss: Tensor, family: Family) -> list[Tensor]:
    parameters = list(family.autoencoder.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", ["none", "gradient_frequency"])
def test_loss_without_discriminator(name: str, learned: bool) -> None:
    family, batch = family_with(None, learned_logvar=learned, perceptual=PerceptualConfig(name, 0.6)), batch_of()
    loss, metrics = family.loss(batch, 0)
    nll, kl, _ = reference_terms(family, batch)
    torch.testing.assert_close(loss, nll + 0.02 * kl, rtol=1e-10, atol=0)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(metrics["kl_nats"], kl.detach(), rtol=1e-10, atol=0)
    assert ("logvar" in metrics, "perceptual" in metrics) == (learned, name != "none")
    assert [phase.trains for phase in family.phases()] == ["autoencoder"]


def test_adversarial_loss_with_its_adaptive_weight_by_hand() -> None:
    family, batch = family_with(), batch_of()
    loss, metrics = family.loss(batch, START)
    nll, kl, adversarial = reference_terms(family, batch)
    last = family.autoencoder.decoder.conv_out.weight
    lengths = []
    for term in (nll, adversarial):
        family.zero_grad()
        term.backward(retain_graph=True)
        lengths.append(last.grad.square().sum().sqrt())
    weight = 0.7 * lengths[0] / (lengths[1] + 1e-4)
    assert 0.0 < weight < 1e4
    torch.testing.assert_close(metrics["adversarial_weight"], weight, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, nll + 0.02 * kl + weight * adversarial, rtol=1e-9, atol=0)
    # The weight is a number: no gradient goes through it.
    expected = gradients(nll + 0.02 * kl + weight.detach() * adversarial, family)
    for found, wanted in zip(gradients(loss, family), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_adaptive_weight_is_bounded() -> None:
    family = family_with()
    with torch.no_grad():
        for parameter in family.discriminator.parameters():
            parameter.zero_()
    _, metrics = family.loss(batch_of(), START)
    assert metrics["adversarial_weight"] == pytest.approx(0.7 * 1e4)


def test_fixed_weight() -> None:
    family, batch = family_with(DiscriminatorConfig(8, 1, weight=3.0, adaptive=False, start_images=0)), batch_of()
    nll, kl, adversarial = reference_terms(family, batch)
    torch.testing.assert_close(family.loss(batch, 0)[0], nll + 0.02 * kl + 3.0 * adversarial, rtol=1e-10, atol=0)
    assert [(phase.trains, phase.revisits) for phase in family.phases()] == [
        ("autoencoder", False),
        ("discriminator", False),
    ]
    assert [phase.revisits for phase in family_with().phases()] == [True, False]


def test_before_its_start_the_discriminator_neither_learns_nor_judges() -> None:
    family, batch = family_with(), batch_of()
    alone = family_with(None).loss(batch, START - 1)[0]
    assert torch.equal(family.loss(batch, START - 1)[0], alone)
    assert not torch.equal(family.loss(batch, START)[0], alone)
    with torch.no_grad():
        for parameter in family.discriminator.parameters():
            parameter += 1.0
    assert torch.equal(family.loss(batch, START - 1)[0], alone)
    assert [phase.is_due(0, START - 1) for phase in family.phases()] == [True, False]
    assert [phase.is_due(0, START) for phase in family.phases()] == [True, True]


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_discriminator_loss_of_images_and_reconstructions(name: str) -> None:
    family, batch = family_with(DiscriminatorConfig(8, 1, loss=name, start_images=0)), batch_of()
    loss, _ = family.discriminator_loss(batch, 0)
    mean, logvar = family.autoencoder.encode(batch["image"])
    noise = rng.normal(family.seed, "posterior", batch["key"], family.latent_shape)
    made = family.autoencoder.decode(mean + (logvar / 2).exp() * noise)
    real, fake = family.discriminator(batch["image"]).sigmoid(), family.discriminator(made).sigmoid()
    if name == "hinge":
        expected = 0.5 * ((1 - real.logit()).clamp(min=0).mean() + (1 + fake.logit()).clamp(min=0).mean())
    else:
        ones, zeros = torch.ones_like(real), torch.zeros_like(real)
        expected = 0.5 * (F.binary_cross_entropy(real, ones) + F.binary_cross_entropy(fake, zeros))
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    loss.backward()  # through the discriminator only, though nothing is frozen here
    assert all(parameter.grad is None for parameter in family.autoencoder.parameters())


def test_the_autoencoders_step_leaves_no_gradient_in_the_discriminator(tmp_path: Path) -> None:
    family = small_family("autoencoder_kl", discriminator=JUDGED)
    trainer = make_trainer(family, tmp_path)
    try:
        batch = trainer.data.first(8).batch
        trainer.units["autoencoder"].accumulate(trainer.phases[0], batch, START, 1.0)
        assert all((parameter.grad == 0).all() for parameter in family.discriminator.parameters())
        assert any((parameter.grad != 0).any() for parameter in family.autoencoder.parameters())
        trainer.units["discriminator"].accumulate(trainer.phases[1], batch, START, 1.0)
        found = [parameter.grad.clone() for parameter in family.discriminator.parameters()]
    finally:
        trainer.close()
    alone = small_family("autoencoder_kl", discriminator=JUDGED)
    freeze_all_but(alone, "discriminator")
    alone.discriminator_loss(batch, START)[0].backward()
    for gradient, parameter in zip(found, alone.discriminator.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def lpips_config(monkeypatch: pytest.MonkeyPatch, folder: Path) -> PerceptualConfig:
    """Of a small network of random weights."""
    monkeypatch.setattr(perceptual, "_VGG16", WIDTHS)
    torch.save(vgg_state() | linear_state(), folder / "lpips.pth")
    return PerceptualConfig("lpips", 1.0, str(folder / "lpips.pth"))


@pytest.mark.parametrize("name", ["gradient_frequency", "lpips"])
def test_the_perceptual_distance_trains_encoder_and_decoder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lpips_config(monkeypatch, tmp_path) if name == "lpips" else PerceptualConfig()
    families = [family_with(None, perceptual=PerceptualConfig(name, weight, config.path)) for weight in (1.0, 0.0)]
    for family in families:
        family.initialize(batch_of())
    batch = batch_of()
    with_it, without = (gradients(family.loss(batch, 0)[0], family) for family in families)
    names = [name for name, _ in families[0].autoencoder.named_parameters()]
    nlls = [reference_terms(family, batch)[0] for family in families]
    by_hand = [gradients(nll, family) for nll, family in zip(nlls, families, strict=True)]
    for key, *found in zip(names, with_it, without, *by_hand, strict=True):
        torch.testing.assert_close(found[0] - found[1], found[2] - found[3], rtol=1e-7, atol=1e-9)
        if key in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
            assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


def test_lpips_is_read_once_and_kept_in_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lpips_config(monkeypatch, tmp_path)
    make = lambda: small_family("autoencoder_kl", perceptual=config)
    fit(make(), tmp_path / "run", num_steps=3)
    Path(config.path).unlink()
    family = make()
    fit(family, tmp_path / "run", num_steps=6)
    assert torch.equal(family.perceptual.linear[2], linear_state()["lin2.model.1.weight"].flatten())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["autoencoder/perceptual"] > 0 for line in lines)
    with pytest.raises(ConfigError, match=r"perceptual\.path: .*there is no such file"):
        fit(make(), tmp_path / "other", num_steps=3)


def test_resumes_bit_exactly_across_the_discriminators_start(tmp_path: Path) -> None:
    make = lambda: small_family("autoencoder_kl", discriminator=JUDGED)
    settings = {"batch_size": 4, "micro_batch_size": 2, "log_every": 1}  # the discriminator joins in the fifth step
    whole = fit(make(), tmp_path / "whole", **settings)
    fit(make(), tmp_path / "parts", num_steps=3, **settings)
    assert fit(make(), tmp_path / "parts", **settings) == whole
    wanted = tree_bytes(tmp_path / "whole/checkpoints/step-00000006")
    assert tree_bytes(tmp_path / "parts/checkpoints/step-00000006") == wanted
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert ["autoencoder/adversarial" in line for line in lines] == [False] * 4 + [True] * 2
    assert ["discriminator/grad_norm" in line for line in lines] == [False] * 4 + [True] * 2
    # Its optimizer begins with it: of gradients that were zero until then, Adam would make a first step many times as
    # long as the rate.
    meta = read_meta(str(tmp_path / "whole/checkpoints/step-00000006"))
    assert meta["updates"] == {"autoencoder": 6, "discriminator": 2}


SGD = OptimConfig(name="sgd", lr=1e-4, momentum=0.9)  # for sums over the pixels


def two_networks() -> AutoencoderKL:
    # Not hinge: while all logits are within its margin, the gradient of the last bias is zero but for rounding.
    judged = DiscriminatorConfig(8, 1, loss="vanilla", start_images=START)
    family = small_family("autoencoder_kl", kl_weight=0.02, discriminator=judged)
    family.local = False  # with the means over workers, all see the adaptive weight of the whole batch
    return family


def train_all(rank: int, world: int, folder: str) -> None:
    for stage in (0, 2, 3):
        parity.train(rank, folder, f"stage-{stage}", two_networks, optim=SGD, zero_stage=stage)


def test_two_engines_agree_with_torch_at_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_workers(train_all, WORLD, str(tmp_path))
    *_, expected = parity.reference(two_networks, SGD)
    for stage in (0, 2, 3):
        found = parity.load(tmp_path, f"stage-{stage}")
        assert parity.worst(found, expected, two_networks().state_dict()) < 1e-5, stage


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_half_precision_keeps_to_the_losses_of_full(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lpips_config(monkeypatch, tmp_path)
    judged = DiscriminatorConfig(8, 1, start_images=0)
    lines = {}
    for name in ("fp32", precision):
        family = small_family("autoencoder_kl", perceptual=config, discriminator=judged)
        settings = {"num_steps": 3, "log_every": 1, "evaluate_every": 3, "precision": name}
        fit(family, tmp_path / name, optim=OptimConfig(lr=1e-4), **settings)
        written = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines[name] = written[0] | written[-1]
    keys = [f"autoencoder/{key}" for key in ("l1", "perceptual", "kl_nats", "adversarial_weight", "grad_norm")]
    keys += ["discriminator/loss", "test/psnr_db", "test/ssim", "test/perceptual"]
    for key in keys:
        assert lines[precision][key] == pytest.approx(lines["fp32"][key], rel=0.1), key


def test_evaluates_reconstructions_from_the_mean() -> None:
    family, batch = family_with().eval(), batch_of()
    with torch.no_grad():
        image = family.reconstruct(batch)
        metrics = family.evaluate(batch)
        assert torch.equal(family.preview(batch)[..., SIZE:], image)
        assert small_family("ddpm").reconstruct(batch) is None
        mean, logvar = family.autoencoder.encode(batch["image"])
        torch.testing.assert_close(image, family.autoencoder.decode(mean).clamp(-1, 1))
    assert image.shape == (8, CHANNELS, SIZE, SIZE)
    assert image.abs().max() <= 1.0
    error = image - batch["image"]
    assert set(metrics) == {"psnr_db", "ssim", "l1", "mse", "kl_nats", "perceptual"}
    psnr_db = torch.stack([10 * (4 / e.square().mean()).log10() for e in error]).mean()
    torch.testing.assert_close(metrics["psnr_db"], psnr_db)
    torch.testing.assert_close(metrics["mse"], error.square().mean())
    torch.testing.assert_close(metrics["l1"], error.abs().mean())
    torch.testing.assert_close(metrics["perceptual"], family.perceptual(image, batch["image"]).mean())
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 8
    torch.testing.assert_close(metrics["kl_nats"], kl)


def test_what_is_not_finite_is_neither_cached_nor_learned_from() -> None:
    family, batch = family_with().eval(), batch_of()
    with torch.no_grad():
        family.autoencoder.encoder.conv_in.weight[0] = math.nan
        for call in (family.reconstruct, family.latents, family.evaluate, lambda batch: family.encode(batch["image"])):
            with pytest.raises(DivergedError, match=r"no posterior: the output of encoder\.conv_in is not finite"):
                call(batch)
    second = small_family("latent_diffusion")
    with torch.no_grad():
        second.first_stage.encoder.conv_in.weight[0] = math.nan
        with pytest.raises(
            DivergedError, match="family.first_stage: 'first'; the standard deviation of its latents is"
        ):
            second.initialize(batch | {"image": batch["image"].float()})


@pytest.mark.parametrize(
    ("discriminator", "message"),
    [
        (DiscriminatorConfig(0), "discriminator.channels: 0; must be from 1"),
        (DiscriminatorConfig(8, 3), "discriminator.num_layers: 3; must be at least 1, and image sides"),
        (DiscriminatorConfig(8, 0), "discriminator.num_layers: 0"),
        (DiscriminatorConfig(8, 1, "wgan"), "discriminator.loss: 'wgan'; must be one of hinge, vanilla"),
        (DiscriminatorConfig(8, 1, weight=float("inf")), "discriminator.weight: inf"),
        (DiscriminatorConfig(8, 1, start_images=-1), "discriminator.start_images: -1; must be at least 0"),
    ],
)
def test_discriminators_that_cannot_be(discriminator: DiscriminatorConfig, message: str) -> None:
    config = AutoencoderKLConfig(AutoencoderConfig(8, (1, 2), 1, 2), discriminator=discriminator)
    assert message in config.problem(SIZE)
    assert AutoencoderKLConfig(AutoencoderConfig(8, (1, 2), 1, 2), discriminator=JUDGED).problem(SIZE) is None
