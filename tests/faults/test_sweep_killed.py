"""A sweep whose command is killed three times at random moments: the trials and metrics of one that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.nodes import environment
from tests.faults.test_cli_runs import DEADLINE_S, ROOT, run_to_end, start
from tests.support import tree_bytes

pytestmark = [pytest.mark.ray, pytest.mark.faults]

SWEEP = {
    "base": str(ROOT / "configs/digits/vae.yaml"),
    "family": {"autoencoder": {"channels": [8, 8]}, "latent_dim": 4, "iwae_samples": 1},
    "train": {"num_steps": 120, "evaluate_every": 20, "checkpoint_every": 20, "sample_every": None, "log_every": 20},
    "cluster": {"num_workers": 1},
    "sweep": {
        "metric": "test/elbo_nats",
        "mode": "max",
        "space": {"optim.autoencoder.lr": {"log_uniform": [1e-4, 1e-2]}},
        "num_trials": 4,
        "concurrency": 2,
        "scheduler": {"name": "asha", "first_step": 20, "reduction": 2},
    },
}


def command(folder: Path, digits: Path, name: str) -> list[str]:
    path = folder / f"{name}.yaml"
    data = {"train": f"{digits}/train", "test": f"{digits}/test", "batch_size": 8}
    path.write_text(yaml.safe_dump(SWEEP | {"data": data, "run": {"dir": str(folder / name)}}))
    return [sys.executable, "-m", "gmdist.cli", "sweep", str(path)]


def found(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "sweep.json").read_text())
    keys = ("trial", "state", "settings", "step", "metric", "run")
    return {"trials": [{key: trial[key] for key in keys} for trial in content["trials"]], "best": content["best"]}


def test_killed_three_times_it_ends_as_one_left_alone(digits: Path, tmp_path: Path) -> None:
    began_s = time.monotonic()
    alone = run_to_end(command(tmp_path, digits, "alone"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    took_s = time.monotonic() - began_s
    source = random.Random(os.environ.get("GMDIST_TEST_SEED", "0"))
    for _ in range(3):
        killed = start(command(tmp_path, digits, "killed"))
        try:
            killed.wait(source.uniform(0.2, 0.6) * took_s)
        except subprocess.TimeoutExpired:
            os.killpg(killed.pid, signal.SIGKILL)
        assert killed.wait(DEADLINE_S) in (0, -signal.SIGKILL)
    ended = run_to_end(command(tmp_path, digits, "killed"), environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert found(tmp_path / "killed") == found(tmp_path / "alone")
    best = found(tmp_path / "alone")["trials"][found(tmp_path / "alone")["best"]]
    name = f"trials/{best['run']}/checkpoints/step-00000120"
    assert tree_bytes(tmp_path / "killed" / name) == tree_bytes(tmp_path / "alone" / name)
    assert (
        yaml.safe_load((tmp_path / "killed/best.yaml").read_text())["optim"]["autoencoder"]["lr"]
        == (best["settings"]["optim.autoencoder.lr"])
    )
