"""Runs of the digits' configs, for tables of what came out: trained where they are not, and measured."""

import json
import subprocess
import time
from pathlib import Path

import torch

from gmdist import runs


def trained(name: str, root: Path, *settings: str) -> float | None:
    """Train a family's config into `root`; returns minutes, or None where the run was begun before."""
    was_there = (root / name / "config.yaml").exists()
    start_s = time.monotonic()
    subprocess.run(["gmdist", "train", f"configs/digits/{name}.yaml", *settings, f"run.dir={root / name}"], check=True)
    return None if was_there else (time.monotonic() - start_s) / 60


def measured(run: Path, *options: str) -> dict[str, float]:
    """What `gmdist evaluate` writes down."""
    subprocess.run(["gmdist", "evaluate", str(run), *options], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "evaluation.json").read_text())["metrics"]


def size_of(run: Path) -> int:
    """Trained parameters."""
    with torch.device("meta"):
        family = runs.build_family(runs.read_config(str(run)))
    return sum(p.numel() for phase in family.phases() for p in getattr(family, phase.trains).parameters())
