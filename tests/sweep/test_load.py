"""The sweeps that come with gmdist, and how values get into the configs of trials."""

from pathlib import Path

import pytest

from gmdist.sweep.load import load_run, load_sweep
from gmdist.sweep.search import settings_of
from gmdist.sweep.trials import History

ROOT = Path(__file__).parent.parent.parent
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_of_a_ready_sweep_can_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(str(path))
    for trial in range(1 if sweep.plan.sweep.search == "tpe" else sweep.plan.sweep.trials):
        config = sweep.config_of(settings_of(sweep.plan, trial, History()), sweep.run_dir(str(trial)))
        assert config.run.dir.endswith(f"trials/{trial}")
        assert config.train.seed == sweep.base.train.seed
    assert sweep.plan.stops[-1] == sweep.base.train.num_steps


def test_there_are_the_four_kinds() -> None:
    assert {path.stem for path in SWEEPS} >= {
        *("digits_noise_schedules", "digits_vae_betas", "digits_gan_pbt", "digits_codebooks"),
    }


def test_the_config_of_a_run_is_that_of_a_file_with_a_sweep_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_run("configs/digits/vae.yaml").run.dir.endswith("runs/digits/vae")
    assert load_run("configs/sweeps/digits_vae_betas.yaml").run.dir.endswith("runs/sweeps/digits_vae_betas")


def test_a_mapping_as_a_value_leaves_the_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep("configs/sweeps/digits_noise_schedules.yaml")
    config = sweep.config_of(
        {"family.diffusion": {"schedule": "linear", "betas": [1e-4, 0.01]}, "optim.denoiser.lr": 3e-4}, "runs/x"
    )
    assert config.family.diffusion.schedule == "linear"
    assert config.family.diffusion.betas == (1e-4, 0.01)
    assert config.family.diffusion.sampler.guidance == 1.5
    assert config.optim["denoiser"].lr == 3e-4
    assert config.optim["denoiser"].warmup_steps == 50
