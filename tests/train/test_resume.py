"""Every change of the number of workers and of the ZeRO stage goes on with the losses of the uninterrupted run."""

import itertools
import json
from pathlib import Path

import pytest

from tests.support import Linear, fit, make_trainer, run_workers

STEPS, BATCH = 20, 12  # steps in each state; the batch is divided by 1, 2, 3 and 4
# (workers, stage): all 16, and between them every change of either, in both directions, and every one that stays.
WALK = [(1, 0), (1, 2), (3, 3), (2, 1), (4, 0), (1, 1), (2, 2), (3, 2), (3, 1), (4, 1), (2, 3), (2, 0), (1, 3), (4, 3)]
WALK += [(4, 2), (3, 0), (1, 0)]


def train_on(rank: int, world: int, folder: str, stage: int, steps: int) -> None:
    settings = {"batch_size": BATCH, "num_steps": steps, "log_every": 1, "checkpoint_every": 10**6}
    trainer = make_trainer(Linear(), Path(folder), zero_stage=stage, rank=rank, world_size=world, **settings)
    assert trainer.step == steps - STEPS
    trainer.fit()
    trainer.close()


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["net/loss"] for line in lines}


def digests(run: Path) -> list[str]:
    return [json.loads(line)["order_digest"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_walk_meets_every_change() -> None:
    assert len(set(WALK)) == 16
    for axis in (0, 1):
        assert len({(a[axis], b[axis]) for a, b in itertools.pairwise(WALK)}) == 16


def test_every_size_and_stage_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    total = STEPS * len(WALK)
    fit(Linear(), tmp_path / "whole", batch_size=BATCH, num_steps=total, log_every=1, checkpoint_every=10**6)
    for number, (world, stage) in enumerate(WALK, start=1):
        run_workers(train_on, world, str(tmp_path / "walk"), stage, number * STEPS)
    whole, changed = losses(tmp_path / "whole"), losses(tmp_path / "walk")
    assert list(changed) == list(whole) == list(range(1, total + 1))
    assert digests(tmp_path / "walk") == digests(tmp_path / "whole")
    for step, loss in whole.items():
        assert changed[step] == pytest.approx(loss, rel=1e-4), (step, WALK[(step - 1) // STEPS])
