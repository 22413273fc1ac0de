"""Every fault at once, for epochs, while the number of workers changes: one order, nothing lost, nothing twice."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gmdist import ranged
from gmdist.data.loader import DataConfig, Loader
from tests.s3.proxy import Fault, FaultProxy

pytestmark = pytest.mark.s3

BATCH, STEPS = 60, 15
WORKERS = (4, 3, 1, 6)
FAULTS = [
    Fault("status"),
    Fault("status", code=500, error="InternalError"),
    Fault("reset", after=900),
    Fault("close", after=700),
    Fault("short", after=3),
    Fault("flip", after=1000),
    Fault("whole"),
    Fault("shifted"),
]


def run(folder: str, workers: tuple[int, ...], **changes: Any) -> tuple[int, Counter[int]]:
    """Train for STEPS steps with each number of workers in turn; returns digest and the numbers that were seen."""
    digest, seen = 0, Counter[int]()
    config = DataConfig(folder, BATCH, image_size=32, channels=1, num_classes=10, **changes)
    for phase, world_size in enumerate(workers):
        for rank in range(world_size):
            batches = Loader(config, folder, rank, world_size).batches(phase * STEPS * BATCH)
            for _ in range(STEPS):
                loaded = next(batches)
                digest += loaded.digest
                seen.update(loaded.batch["key"].tolist())
            batches.close()
    return digest & (2**64 - 1), seen


@pytest.mark.parametrize("cached", [False, True])
def test_a_quarter_of_all_reads_fail(
    proxy: FaultProxy, stored_digits: str, digits: Path, tmp_path: Path, cached: bool
) -> None:
    expected, _ = run(str(digits / "train"), (1,) * len(WORKERS))
    draw = random.Random(0)

    def decide(path: str, count: int) -> Fault | None:
        if draw.random() < 0.005:
            return Fault("stall", after=300)
        return draw.choice(FAULTS) if draw.random() < 0.25 else None

    proxy.decide = decide
    changes: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.0003} if cached else {}
    digest, seen = run(f"{stored_digits}/train", WORKERS, **changes)
    assert digest == expected
    assert seen == Counter(range(len(WORKERS) * STEPS * BATCH))
    assert proxy.faults > 20
    assert ranged.counters.snapshot()["retries"] > 20
    if cached:
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        assert 0 < kept <= 0.0003 * 2**30


@pytest.mark.parametrize(
    "changes",
    [
        {"num_threads": 5},
        {"prefetch_batches": 1, "prefetch_mib": 1},
        {"cache_gib": 1.0, "num_threads": 1},
    ],
)
def test_no_setting_changes_the_order(
    bucket: str, stored_digits: str, digits: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "cache_gib" in changes:
        changes = {**changes, "cache_dir": str(tmp_path / "cache")}
    expected, _ = run(str(digits / "train"), (1, 1))
    assert run(f"{stored_digits}/train", (2, 5), **changes)[0] == expected
