"""Runs of the digits' configs, for tables of what came out: trained where they are not, and measured."""

import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from gmdist import runs


def trained(name: str, root: Path, *settings: str) -> float | None:
    """Train a family's config into `root`; returns minutes, or None where the run was begun before."""
    was_there = (root / name / "config.yaml").exists()
    start_s = time.monotonic()
    subprocess.run(["gmdist", "train", f"configs/digits/{name}.yaml", *settings, f"run.dir={root / name}"], check=True)
    return None if was_there else (time.monotonic() - start_s) / 60


def shown(minutes: float | None) -> str:
    """Minutes of training, in a table."""
    return "not timed" if minutes is None else f"{minutes:.1f}"


def in_time(minutes: Iterable[float | None], most: float) -> tuple[str, bool]:
    """What `verdict` is told of the slowest training of this call."""
    slowest = max((spent for spent in minutes if spent is not None), default=0.0)
    return f"slowest training of this call {slowest:.1f} minutes (asked: {most:g})", slowest <= most


def verdict(asked: Iterable[tuple[str, bool]]) -> int:
    """Print what was asked for, each with whether it holds; a command's exit code, 1 where something does not."""
    code = 0
    for line, holds in asked:
        print(f"{line}{'' if holds else ': falls short'}")
        code = code if holds else 1
    return code


def measured(run: Path, *options: str) -> dict[str, float]:
    """What `gmdist evaluate` writes down."""
    subprocess.run(["gmdist", "evaluate", str(run), *options], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "evaluation.json").read_text())["metrics"]


def size_of(run: Path) -> int:
    """Trained parameters."""
    with torch.device("meta"):
        family = runs.build_family(runs.read_config(str(run)))
    return sum(p.numel() for phase in family.phases() for p in getattr(family, phase.trains).parameters())
