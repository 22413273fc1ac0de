"""Every fault at once, for epochs, while the number of workers changes: one order, nothing lost, nothing twice."""

import io
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmdist import ranged, storage
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.data.pack import write_shards
from gmdist.data.prefetch import CONNECTIONS, PART_BYTES
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
    config = DataConfig(train=folder, batch_size=BATCH, image_size=32, channels=1, num_classes=10, **changes)
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
        deadline_s = time.monotonic() + 30
        while list((tmp_path / "cache").glob("*.tmp")):  # of reads that are given up now
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
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


def test_memory_stays_within_its_bound(proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    values, samples, batch_size, memory_mib = 25_600, 800, 8, 4  # 200 KB a sample, 160 MB in all

    def array(number: int) -> bytes:
        content = io.BytesIO()
        np.save(content, np.random.default_rng(number).standard_normal(values))
        return content.getvalue()

    write_shards(((f"{i}", {"latent.npy": array(i)}) for i in range(samples)), str(tmp_path / "made"), num_shards=8)
    for path in sorted((tmp_path / "made").iterdir()):
        storage.copy_from_local(str(path), f"{bucket}/latents/{path.name}")
    draw = random.Random(0)
    proxy.decide = lambda path, count: draw.choice(FAULTS) if draw.random() < 0.1 else None
    config = DataConfig(
        train=f"{bucket}/latents",
        batch_size=batch_size,
        image_size=1,
        image=False,
        arrays=("latent.npy",),
        prefetch_mib=memory_mib,
        prefetch_batches=2,
    )
    batches = Loader(config, f"{bucket}/latents").batches(0)
    tracemalloc.start()
    try:
        seen = sum(len(next(batches).tensors["key"]) for _ in range(samples // batch_size))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        batches.close()
    assert seen == samples
    # What is ready, parts on their way, and a few batches with their indexes.
    assert peak_bytes < (memory_mib << 20) + CONNECTIONS * PART_BYTES + (12 << 20)
