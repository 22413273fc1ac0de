"""Exported runs in diffusers: its pipelines draw what our samplers draw, and its weights start our runs."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete
from torch import Tensor

from gmdist import rng
from gmdist.config import load
from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.diffusion.process import Diffusion
from gmdist.errors import ConfigError
from gmdist.families.family import Condition
from gmdist.interchange.schedulers import scheduler_config
from gmdist.launch.export import export
from gmdist.runs import build_family, open_run
from gmdist.start import check_start
from tests.exporting import DIT, SIZE, UNET, settings, train
from tests.parity.clip import write_clip

pytestmark = pytest.mark.parity

PROMPTS, LABELS = ("a cat", "dog"), (3, 1)
SAMPLERS = {
    "ddim": (8, "{name: ddim, num_steps: 8, spacing: leading, ends_clean: false, guidance: 3.0}"),
    "dpmpp_2m": (16, "{name: dpmpp_2m, num_steps: 16, guidance: 3.0}"),
}


@pytest.fixture(scope="module")
def runs(noise: str, noise_stage: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of a run of each exportable kind; they are trained."""
    folder, clip = tmp_path_factory.mktemp("runs"), write_clip(tmp_path_factory.mktemp("clip"))
    common = [f"family.first_stage={noise_stage}", "family.diffusion={schedule: scaled_linear, prediction: v}"]
    text = [UNET, f"family.conditioning={{kind: text, text: {{name: clip, path: {clip}}}}}", "data.caption=txt"]
    kinds = {"unet": [*common, *text, "data.num_classes=null"], "dit": [*common, *DIT]}
    own = "family.dit={channels: 16, depth: 2, num_heads: 2, block_embeddings: true}"
    kinds["dit_block_embeddings"] = [*kinds["dit"], own]
    for name, more in kinds.items():
        train("latent_diffusion", noise, folder / name, *more)
    return {name: settings("latent_diffusion", noise, folder / name, *more) for name, more in kinds.items()}


def run_of(arguments: list[str]) -> str:
    return load(arguments[0], arguments[1:]).run.dir


def start_of(family: Any) -> Tensor:
    return rng.normal(family.seed, "sample", torch.arange(2), family.shape)


def close(found: np.ndarray, wanted: Tensor) -> None:
    """Images in [0, 1] against ours in [-1, 1], to 1e-5 of their size."""
    image = torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1
    assert wanted.std() > 0.01
    assert (wanted.abs() < 1.0).float().mean() > 0.5
    assert (image - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stable_diffusion_draws_the_same(sampler: str, runs: dict[str, list[str]], tmp_path: Path) -> None:
    steps, values = SAMPLERS[sampler]
    override = f"family.diffusion.sampler={values}"
    assert "StableDiffusionPipeline" in export(run_of(runs["unet"]), str(tmp_path), "diffusers", [override])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    config = load(runs["unet"][0], [*runs["unet"][1:], override])
    _, family = open_run(config.run.dir, config)
    with torch.no_grad():
        wanted = family.sample(torch.arange(2), Condition(prompts=PROMPTS))
        other = family.sample(torch.arange(2), Condition(prompts=("bird", "fish")))
    assert not torch.allclose(wanted, other, atol=1e-3)
    found = pipeline(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=3.0, latents=start_of(family), output_type="np"
    )
    close(found.images, wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["dit", "dit_block_embeddings"])
def test_dit_pipeline_draws_the_same(
    sampler: str, kind: str, runs: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, values = SAMPLERS[sampler]
    override = f"family.diffusion.sampler={values}"
    export(run_of(runs[kind]), str(tmp_path), "diffusers", [override])
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["3"]) == [3]
    config = load(runs[kind][0], [*runs[kind][1:], override])
    _, family = open_run(config.run.dir, config)
    with torch.no_grad():
        wanted = family.sample(torch.arange(2), Condition(torch.tensor(LABELS)))
        other = family.sample(torch.arange(2), Condition(torch.tensor(LABELS[::-1])))
    assert not torch.allclose(wanted, other, atol=1e-3)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: start_of(family))  # it takes no latents
    found = pipeline(list(LABELS), num_inference_steps=steps, guidance_scale=3.0, output_type="np")
    close(found.images, wanted)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_pipelines_of_pixels_draw_the_same(
    sampler: str, noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [UNET, "family.unet.num_heads=1", "family.conditioning={kind: none}"]
    more += [f"family.diffusion={{prediction: v, sampler: {{name: {sampler}, num_steps: 10}}}}"]
    run = train("ddpm", noise, tmp_path / "run", *more)
    line = export(run, str(tmp_path / "out"), "diffusers")
    assert line.endswith("use_clipped_model_output=True" if sampler == "ddim" else "num_inference_steps=10")
    kind = {"ddim": diffusers.DDIMPipeline, "ddpm": diffusers.DDPMPipeline}[sampler]
    pipeline = kind.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    _, family = open_run(run)
    keys = torch.arange(2)
    with torch.no_grad():
        wanted = family.sample(keys)
    drawn = iter([start_of(family), *(rng.normal(family.seed, f"sample/{i}", keys, family.shape) for i in range(10))])
    for module in (pipeline_ddim, pipeline_ddpm, scheduling_ddpm):  # the same noise for both
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    call = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    images = pipeline(batch_size=2, num_inference_steps=10, output_type="np", **call).images
    found = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert (wanted.abs() == 1.0).any()  # where clipping matters
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_the_autoencoder_of_a_first_stage(noise_stage: str, tmp_path: Path) -> None:
    export(noise_stage, str(tmp_path), "diffusers")
    peer, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert peer.config.scaling_factor == 1.0
    _, family = open_run(noise_stage)
    image = rng.normal(0, "image", torch.arange(2), (3, SIZE, SIZE)).clamp(-1, 1)
    with torch.no_grad():
        found = peer.decode(peer.encode(image).latent_dist.mean).sample.clamp(-1, 1)
        wanted = family.reconstruct({"image": image})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "dit", "dit_block_embeddings"])
@pytest.mark.parametrize("by", ["ours", "theirs"])
def test_export_and_init_from_is_exact(kind: str, by: str, runs: dict[str, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    export(run_of(runs[kind]), str(folder), "diffusers")
    if by == "theirs":
        diffusers.DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
        folder = tmp_path / "theirs"
    _, trained = open_run(run_of(runs[kind]))
    config = load(
        runs[kind][0], [*runs[kind][1:], f"family.init_from={folder}", f"run.dir={tmp_path / 'run'}", "train.seed=9"]
    )
    assert check_start(config) == (None, [])
    family = build_family(config)
    batch = {"key": torch.arange(4), "image": torch.rand(4, 3, SIZE, SIZE)}
    family.initialize(batch)
    wanted = trained.denoiser.network.state_dict()
    assert wanted
    for name, value in family.denoiser.network.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_a_vae_of_a_pipeline_starts_a_first_stage(
    runs: dict[str, list[str]], noise: str, noise_stage: str, tmp_path: Path
) -> None:
    export(run_of(runs["dit"]), str(tmp_path / "pipeline"), "diffusers")
    more = [f"family.init_from={tmp_path / 'pipeline'}", "train.seed=9"]
    path, *overrides = settings("autoencoder_kl", noise, tmp_path / "run", *more)
    family = build_family(load(path, overrides))
    family.initialize({})
    wanted = open_run(noise_stage)[1].autoencoder.state_dict()
    for name, value in family.autoencoder.state_dict().items():
        assert name == "logvar" or torch.equal(value, wanted[name]), name


def toy(x: Tensor, t: Tensor) -> Tensor:
    t = torch.as_tensor(t).double().view(-1, 1, 1, 1)
    return 0.4 * x + 0.5 * torch.sin(2.0 * x + t / 200.0)


def check_scheduler(config: DiffusionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs begins, steps and ends as our sampler does, with the same noise where it draws any."""
    assert config.problem() is None
    written = json.loads(json.dumps(scheduler_config(config)))
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    scheduler.set_timesteps(config.sampler.num_steps)
    start = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(2, 2, 4, 4)
    noise = torch.linspace(2.0, -2.0, 64, dtype=torch.float64).view(2, 2, 4, 4).sin()
    for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    wanted = Diffusion(config).sample(toy, start, lambda i: noise)
    # Theirs takes 1 - abar in fp32, which is wrong by 6e-4 of it at timestep 0 of the linear schedule.
    assert (x - wanted).norm() / wanted.norm() < 5e-5


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize(
    ("prediction", "sampler", "zero_terminal_snr"),
    [
        ("eps", SamplerConfig("ddim", 10), False),
        ("x0", SamplerConfig("ddim", 10, spacing="leading", ends_clean=False), False),
        ("v", SamplerConfig("ddim", 10), True),
        ("eps", SamplerConfig("dpmpp_2m", 20), False),
        ("v", SamplerConfig("dpmpp_2m", 10, ends_clean=False), False),
        ("v", SamplerConfig("ddpm", 10), True),
        ("v", SamplerConfig("euler", 10, spacing="leading"), False),
        ("eps", SamplerConfig("euler_ancestral", 10, spacing="leading"), False),
        ("v", SamplerConfig("heun", 10, spacing="leading"), False),
    ],
)
def test_schedulers_draw_the_same(
    schedule: str,
    prediction: str,
    sampler: SamplerConfig,
    zero_terminal_snr: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DiffusionConfig(schedule, 1000, prediction, sampler, zero_terminal_snr=zero_terminal_snr)
    check_scheduler(config, monkeypatch)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "heun"])
@pytest.mark.parametrize("steps", [10, 60, 100])
def test_schedulers_of_few_timesteps_draw_the_same(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # From 51 steps on leading counts from 0; and the last of these timesteps holds much of the data.
    check_scheduler(DiffusionConfig("linear", 100, "v", SamplerConfig(name, steps, spacing="leading")), monkeypatch)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_every_number_of_steps_is_counted_alike_or_refused(name: str, spacing: str) -> None:
    exported = 0
    for num_steps in range(1, 201):
        config = DiffusionConfig("linear", 200, sampler=SamplerConfig(name, num_steps, spacing=spacing))
        try:
            written = scheduler_config(config)
        except ConfigError:
            continue
        scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == Diffusion(config).sampling_times().tolist()
        exported += 1
    # Of 200 timesteps, 12 divisors; DPM-Solver++ is exported with trailing alone.
    least = 0 if (name, spacing) == ("dpmpp_2m", "leading") else 12 if name == "ddim" and spacing == "trailing" else 170
    assert exported >= least
