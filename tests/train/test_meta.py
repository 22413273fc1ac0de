"""A meta.json that no run writes is not believed, whatever its checksum says."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmdist import storage
from gmdist.errors import CheckpointError
from gmdist.train.checkpoint import find_newest, step_of
from tests.support import Linear, fit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    fit(Linear(), tmp_path / "run")
    return tmp_path / "run"


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.pop(name)


def shards_named(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.update(shards=[meta["shards"][0] | {"name": name} for name in names])


SHARD = "shard-00000-of-00001.safetensors"
UNTRUE: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {name}": without(name) for name in ("shards", "averages", "updates", "skips", "evaluation", "format")},
    "no child has updates": lambda meta: meta.update(updates={}),
    "null": lambda meta: meta.update(shards=None),
    "no shard": lambda meta: meta.update(shards=[]),
    "a shard without a size": lambda meta: meta["shards"][0].pop("bytes"),
    "a shard outside": shards_named("../step-00000003/" + SHARD),
    "an absolute shard": shards_named("/" + SHARD),
    "a shard and a line": shards_named(SHARD + "\n"),
    "a shard twice": shards_named(SHARD, SHARD),
    "a shard of others": shards_named("shard-00000-of-00002.safetensors"),
    "other digits": shards_named(SHARD.replace("00000", "0000\u0660")),
    "no digest": lambda meta: meta.update(order_digest="0x0000000000000g"),
    "half a pair": lambda meta: meta.update(left_out=[[1]]),
    "not finite": lambda meta: meta.update(images=float("nan")),
    "negative": lambda meta: meta.update(cursor=-1),
    "true": lambda meta: meta.update(world_size=True),
    "no shapes": lambda meta: meta["shapes"].update(x=3),
    "another step": lambda meta: meta.update(step=5000),
}


@pytest.mark.parametrize("change", UNTRUE.values(), ids=UNTRUE)
def test_a_meta_that_no_run_writes_is_not_believed(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = str(run / "checkpoints/step-00000006/meta.json")
    meta = storage.read_json(path)
    change(meta)
    storage.write_json(path, meta)  # with a right checksum
    found, warnings = find_newest(str(run))
    assert found is not None
    assert found.meta["step"] == 3
    assert path in warnings[0]


def test_a_child_without_a_number_of_updates_is_named(run: Path) -> None:
    path = str(run / "checkpoints/step-00000006/meta.json")
    storage.write_json(path, storage.read_json(path) | {"updates": {"other": 6}})
    with pytest.raises(CheckpointError, match="does not say how many updates network has had"):
        fit(Linear(), run, num_steps=9)


def test_a_shard_of_object_storage_stays_in_its_folder(bucket, tmp_path: Path) -> None:
    run, name = "s3://pictures/run", "../" * 20 + str(tmp_path / "outside").lstrip("/")
    fit(Linear(), run)
    newest = f"{run}/checkpoints/step-00000006"
    meta = storage.read_json(f"{newest}/meta.json")
    content = storage.read(f"{newest}/{SHARD}")
    bucket.put_object(Bucket="pictures", Key=f"run/checkpoints/step-00000006/{name}", Body=content)
    meta["shards"][0]["name"] = name
    storage.write_json(f"{newest}/meta.json", meta)
    assert fit(Linear(), run, num_steps=8).finished
    assert os.listdir(tmp_path) == []


def test_only_names_that_are_written_are_steps(run: Path) -> None:
    assert [step_of(f"step-{digits}") for digits in ("00000007", "123456789")] == [7, 123456789]
    for digits in ("\u00b2", "\u0660" * 8, "7", "000000007", "00000007\n", "-0000007", ""):
        assert step_of(f"step-{digits}") is None
    shutil.copytree(run / "checkpoints/step-00000006", run / "checkpoints/step-00000099")
    (run / "checkpoints/step-\u00b2").mkdir()
    found, warnings = find_newest(str(run))
    assert found is not None
    assert found.meta["step"] == 6
    assert len(warnings) == 1
    assert "step-00000099/meta.json: of step 6, in the folder of another" in warnings[0]
