"""Averages over observations and workers, the lines that are written, and the bad samples of all workers."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmdist.errors import DataError
from gmdist.train.metrics import Averages, MetricsLog, Quarantine
from tests.support import run_workers

CPU = torch.device("cpu")


def test_means_are_weighted_and_leave_out_what_is_not_finite() -> None:
    averages = Averages(CPU)
    averages.add({"a": torch.tensor(1.0), "v": torch.tensor([1.0, math.nan, math.inf])}, weight=3.0)
    averages.add({"a": torch.tensor(5.0), "v": torch.tensor([5.0, 7.0, math.nan])}, weight=1.0)
    means = averages.means()
    assert means["a"] == 2.0
    assert means["v"][:2].tolist() == [2.0, 7.0]
    assert means["v"][2].isnan()
    assert averages.means() == {}


def test_of_an_evaluation_what_is_not_finite_counts() -> None:
    averages = Averages(CPU, finite_only=False)
    averages.add({"a": torch.tensor(math.inf), "b": torch.tensor(math.nan)}, weight=50.0)
    averages.add({"a": torch.tensor(0.1), "b": torch.tensor(0.1), "c": torch.tensor(2.0)})
    averages.add({"c": torch.tensor(math.nan)}, weight=0.0)  # a sample that is there for others' sake
    means = averages.means()
    assert means["a"] == math.inf
    assert means["b"].isnan()
    assert means["c"] == 2.0


def test_a_line_is_json_whatever_was_measured(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), 0)
    log.write({"step": 1, "a": math.nan, "b": -math.inf, "c": 0.5, "order_digest": "00"})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": 0.5, "order_digest": "00"}


def test_lines_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    log = MetricsLog(str(tmp_path), 0)
    log.write({"step": 1, "loss": 0.5})
    synced.clear()
    log.flush()
    assert synced == [f"{tmp_path}/metrics.jsonl"]
    log.close()


def test_steps_that_are_made_again_are_in_no_log_twice(tmp_path: Path) -> None:
    for first in (1, 1, 3):  # begun, begun again before any checkpoint, gone on with from one of step 2
        log = MetricsLog(str(tmp_path), first - 1)
        for step in range(first, 6):
            log.write({"step": step, "loss": 1.0 / step})
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def _quarantined(folder: str, rank: int, sample: str) -> None:
    quarantine = Quarantine(folder, 2)
    quarantine.add([{"number": rank, "shard": "s.tar", "sample": sample, "reason": "cut"}])
    gathered = quarantine.gather()
    if rank == 0:
        quarantine.write(gathered)
    quarantine.check()


def _each_has_a_bad_sample(rank: int, world_size: int, folder: str) -> None:
    _quarantined(folder, rank, f"sample {rank}")
    dist.barrier()  # workers start anew when the others have ended
    with pytest.raises(DataError, match=r"3 samples cannot be decoded, more than the 2 that data\.max_bad_fraction"):
        _quarantined(folder, rank, f"another {rank}" if rank == 0 else f"sample {rank}")


def test_bad_samples_are_counted_over_workers_and_starts(tmp_path: Path) -> None:
    run_workers(_each_has_a_bad_sample, 2, str(tmp_path))
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3


def test_a_bad_sample_of_a_data_set_that_has_moved_counts_once(tmp_path: Path) -> None:
    def meet(shard: str, data_set: int) -> None:
        quarantine = Quarantine(str(tmp_path), 1)
        line = {"number": 1, "data_set": data_set, "shard": shard, "sample": "k", "reason": "cut"}
        quarantine.add([line])
        quarantine.write(quarantine.gather())
        quarantine.check()

    meet("/old/s.tar", 0)
    meet("s3://bucket/new/s.tar", 0)
    with pytest.raises(DataError, match="2 samples cannot be decoded"):
        meet("/old/s.tar", 1)


def _each_adds(rank: int, world_size: int) -> None:
    averages = Averages(CPU)
    averages.add({"both": torch.full((2, 3), float(rank))}, weight=1.0 + rank)
    if rank == 1:
        averages.add({"alone": torch.tensor([4.0, 5.0])})
    restored = Averages(CPU)
    restored.restore(averages.gather())
    for kept in (averages, restored):
        means = kept.means()
        assert list(means) == ["alone", "both"]
        assert means["alone"].tolist() == [4.0, 5.0]
        torch.testing.assert_close(means["both"], torch.full((2, 3), 2.0 / 3.0, dtype=torch.float64))


def test_means_over_workers_that_do_not_have_the_same() -> None:
    run_workers(_each_adds, 2)
