"""Checkpoints: complete or skipped, kept by count, and nothing lost when a save fails."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from gmdist import storage
from gmdist.checksum import crc32
from gmdist.errors import CheckpointError, ConfigError, SaveError, StorageError
from gmdist.train.checkpoint import Reader, find_newest, newest_step, read_meta, tensor_key, verify
from gmdist.train.metrics import MetricsLog
from gmdist.train.optim import OptimConfig
from gmdist.train.saver import Saver
from tests.support import Linear, deletes_refused, fit, make_trainer, tree_bytes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    fit(Linear(), tmp_path / "run")
    return tmp_path / "run"


def damage(run: Path, how: str) -> None:
    newest = run / "checkpoints/step-00000006"
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    if how == "no meta":
        (newest / "meta.json").unlink()
    elif how == "half a meta":
        (newest / "meta.json").write_text((newest / "meta.json").read_text()[:50])
    elif how == "another format":
        meta = storage.read_json(str(newest / "meta.json"))
        storage.write_json(str(newest / "meta.json"), meta | {"format": 99})
    elif how == "shard missing":
        shard.unlink()
    elif how == "shard cut":
        shard.write_bytes(content[:-10])
    elif how == "a flipped bit":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)


DAMAGES = {
    "no meta": "incomplete, it has no meta.json",
    "half a meta": "damaged",
    "another format": "format 99",
    "shard missing": "missing",
    "shard cut": "bytes instead of",
    "a flipped bit": "crc32 differs",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_an_unsound_checkpoint_is_skipped_with_a_warning(run: Path, how: str) -> None:
    whole = tree_bytes(run / "checkpoints")
    damage(run, how)
    found, warnings = find_newest(str(run))
    assert found is not None
    assert found.meta["step"] == 3
    assert len(warnings) == 1
    assert DAMAGES[how] in warnings[0]
    assert "step-00000006" in warnings[0]
    # Training goes on from the older one, and ends where it would have.
    fit(Linear(), run)
    assert tree_bytes(run / "checkpoints") == whole


def test_how_far_a_run_has_come_is_told_without_reading_its_shards(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "checksum", None)
    assert newest_step(str(run)) == 6
    damage(run, "half a meta")  # it is incomplete, or nobody knows what it is
    assert newest_step(str(run)) == 3
    damage(run, "no meta")
    assert newest_step(str(run)) == 3
    (run / "checkpoints/step-00000003/meta.json").unlink()
    assert newest_step(str(run)) == newest_step(str(run / "nothing")) == 0


@pytest.mark.parametrize("key", ["step", "images", "updates", "order_digest", "shapes", "shards"])
def test_a_changed_meta_is_not_believed(run: Path, key: str) -> None:
    path = run / "checkpoints/step-00000006/meta.json"
    meta = json.loads(path.read_text())
    for change in ({key: meta[key] + 1 if isinstance(meta[key], int) else None}, None):
        wrong = meta | change if change else {name: value for name, value in meta.items() if name != key}
        path.write_text(json.dumps(wrong))
        found, warnings = find_newest(str(run))
        assert found is not None
        assert found.meta["step"] == 3
        assert "damaged" in warnings[0]


def put(checkpoint: Path, head: bytes, num_bytes: int | None = None) -> None:
    """Replace the shard by one that is nothing but a head, and let meta.json vouch for it."""
    content = (len(head) if num_bytes is None else num_bytes).to_bytes(8, "little") + head
    next(checkpoint.glob("*.safetensors")).write_bytes(content)
    meta = storage.read_json(str(checkpoint / "meta.json"))
    meta["shards"][0] |= {"bytes": len(content), "crc32": crc32(content)}
    storage.write_json(str(checkpoint / "meta.json"), meta)


def head(dtype: str, start: int, stop: int) -> bytes:
    """Of a shard with one element of a tensor."""
    description = {"dtype": dtype, "shape": [1], "data_offsets": [start, stop]}
    return json.dumps({"param|a|0": description}).encode()


def in_place_of(path: Path, make: Callable[[Path], None]) -> None:
    """Put something else where a file or folder is."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def a_circle(path: Path) -> None:
    path.symlink_to(path.name)


UNSOUND: dict[str, Callable[[Path], None]] = {
    "meta.json: Is a directory": lambda newest: in_place_of(newest / "meta.json", Path.mkdir),
    "meta.json: Too many levels": lambda newest: in_place_of(newest / "meta.json", a_circle),
    "of-00001.safetensors: Is a directory": lambda newest: in_place_of(next(newest.glob("sh*")), Path.mkdir),
    "of-00001.safetensors: Too many levels": lambda newest: in_place_of(next(newest.glob("sh*")), a_circle),
    "meta.json: Not a directory": lambda newest: in_place_of(newest, Path.touch),
    "6/meta.json: Too many levels": lambda newest: in_place_of(newest, a_circle),
    "meta.json: damaged (RecursionError": lambda newest: (newest / "meta.json").write_text("[" * 200_000),
    "safetensors: damaged (maximum recursion": lambda newest: put(newest, b"[" * 100_000),
    "safetensors: damaged ('list' object": lambda newest: put(newest, b"[]"),
    "safetensors: damaged (it is no safetensors file)": lambda newest: put(newest, b"{}", num_bytes=3),
    "'param|a|0' [-1] is not a piece": lambda newest: put(newest, b'{"param|a|0":{"shape":[-1]}}'),
    "'param|a|00' [1] is not a piece": lambda newest: put(newest, b'{"param|a|00":{"shape":[1]}}'),
    "'param|a|-5' [1] is not a piece": lambda newest: put(newest, b'{"param|a|-5":{"shape":[1]}}'),
    "'param' [1] is not a piece": lambda newest: put(newest, b'{"param":{"shape":[1]}}'),
    "not enough values": lambda newest: put(newest, b'{"param|a|0":{"shape":[]}}'),
    "'param|a|0' [1] is not in bytes 0 to 4": lambda newest: put(newest, head("F32", 0, 4)),
    "'param|a|0' [1] is not in bytes 0 to 0": lambda newest: put(newest, head("F32", 0, 0)),
    "'param|a|0' [1] is not in bytes -4 to 0": lambda newest: put(newest, head("F32", -4, 0)),
    "damaged ('F4')": lambda newest: put(newest, head("F4", 0, 0)),
    "too many values": lambda newest: put(newest, b'{"param|a|0":{"shape":[1,1]}}'),
}


@pytest.mark.parametrize("words", UNSOUND)
def test_what_is_no_checkpoint_is_skipped_whatever_it_is(run: Path, words: str) -> None:
    newest = run / "checkpoints/step-00000006"
    UNSOUND[words](newest)
    found, warnings = find_newest(str(run))
    assert found is not None
    assert found.meta["step"] == 3
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "\n" not in warnings[0]
    with pytest.raises(CheckpointError):  # one that is named
        verify(str(newest), read_meta(str(newest)))
    assert fit(Linear(), run, keep_checkpoints=2).finished  # and it is replaced
    assert find_newest(str(run))[1] == []


@pytest.mark.parametrize("make", [Path.mkdir, a_circle], ids=["folder", "circle"])
def test_a_run_whose_only_meta_is_something_else_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    fit(Linear(), tmp_path, num_steps=3)
    in_place_of(tmp_path / "checkpoints/step-00000003/meta.json", make)
    with pytest.raises(CheckpointError, match="none of the checkpoints can be used"):
        fit(Linear(), tmp_path)


def test_a_checkpoint_on_another_disk_is_let_go(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "checkpoints/step-00000003", tmp_path / "elsewhere")
    (run / "checkpoints/step-00000003").symlink_to(tmp_path / "elsewhere")
    there = tree_bytes(tmp_path / "elsewhere")
    fit(Linear(), run, num_steps=9, keep_checkpoints=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000009"]
    assert tree_bytes(tmp_path / "elsewhere") == there


def test_a_checkpoint_that_cannot_be_pruned_is_named_and_the_new_one_stays(bucket) -> None:
    run = "s3://pictures/run"
    fit(Linear(), run, num_steps=3)
    words = r"^s3://pictures/run/checkpoints/step-00000003/shard-00000-of-00001\.safetensors: access denied; check"
    with deletes_refused("AccessDenied"), pytest.raises(StorageError, match=words):
        fit(Linear(), run, keep_checkpoints=1)
    found, warnings = find_newest(run)
    assert found is not None
    assert (found.meta["step"], warnings) == (6, [])
    fit(Linear(), run, num_steps=9, keep_checkpoints=1)
    assert storage.list_names(f"{run}/checkpoints") == ["step-00000009"]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(run: Path) -> None:
    for shard in run.glob("checkpoints/*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    before = tree_bytes(run)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints can be used .*or set run\.overwrite=true"):
        fit(Linear(), run)
    assert tree_bytes(run) == before
    for meta in run.glob("checkpoints/*/meta.json"):  # but a first save that was interrupted is no loss
        meta.unlink()
    assert fit(Linear(), run).finished


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_newest(str(tmp_path / "nothing")) == (None, [])
    (tmp_path / "run/checkpoints/not-a-step").mkdir(parents=True)
    assert find_newest(str(tmp_path / "run")) == (None, [])


def test_the_newest_is_chosen_by_step_and_old_ones_go(tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=6, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_a_failed_save_says_why_and_keeps_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree_bytes(run / "checkpoints")
    real = os.fsync

    def full(descriptor):
        if "step-00000009" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"step-00000009.*No space left on device; free some space") as caught:
        fit(Linear(), run, num_steps=12)
    assert "\n" not in str(caught.value)
    assert tree_bytes(run / "checkpoints") == before  # the half-written one is gone
    monkeypatch.undo()
    assert fit(Linear(), run, num_steps=12).finished


def test_metrics_are_written_before_the_checkpoint_that_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []

    def flush(log: MetricsLog) -> None:
        time.sleep(0.2)  # in which a checkpoint that has begun would be there
        there.append(len(list(tmp_path.glob("checkpoints/*"))))

    monkeypatch.setattr(MetricsLog, "flush", flush)
    fit(Linear(), tmp_path, num_steps=6, checkpoint_every=3)
    assert there[:2] == [0, 1]


def test_ranges_are_read_across_shards(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    location = tmp_path / "checkpoints/step-00000001"
    shards = []
    for number, pieces in enumerate([[(0, 4)], [(7, 10), (4, 7)]]):
        content = save_safetensors({tensor_key("param", "a|b", s): whole[s:e].clone() for s, e in pieces})
        storage.write(str(location / f"{number}.safetensors"), content)
        shards.append({"name": f"{number}.safetensors", "bytes": len(content)})
    with Reader(str(location), {"shards": shards}) as reader:
        for start, count in ((0, 10), (2, 6), (5, 1), (9, 1), (3, 0)):
            values = torch.full((count,), torch.nan)
            reader.read("param", "a|b", start, values)
            assert torch.equal(values, whole[start : start + count])
        with pytest.raises(CheckpointError, match=r"has 2 of 4 elements of a\|b"):
            reader.read("param", "a|b", 8, torch.zeros(4))
        with pytest.raises(CheckpointError, match="has 0 of 1 elements of other"):
            reader.read("param", "other", 0, torch.zeros(1))
        with pytest.raises(CheckpointError, match="is torch.float32; the model has torch.int64"):
            reader.read("param", "a|b", 0, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 4), (0, 4)], "has elements of a .* twice"),  # as many as were asked for
        ([(0, 5), (4, 7)], "has elements of a .* twice"),
        ([(0, 8), (2, 3)], "has elements of a .* twice"),
        ([(0, 3), (4, 8)], "has 7 of 8 elements of a"),
        ([(1, 8)], "has 7 of 8 elements of a"),
        ([(0, 7)], "has 7 of 8 elements of a"),
    ],
)
def test_a_hole_is_not_made_up_for(tmp_path: Path, pieces: list[tuple[int, int]], words: str) -> None:
    shards = []
    for number, (start, stop) in enumerate(pieces):
        content = save_safetensors({tensor_key("param", "a", start): torch.arange(start, stop, dtype=torch.float32)})
        storage.write(str(tmp_path / f"{number}"), content)
        shards.append({"name": f"{number}", "bytes": len(content)})
    with Reader(str(tmp_path), {"shards": shards}) as reader, pytest.raises(CheckpointError, match=words):
        reader.read("param", "a", 0, torch.zeros(8))


def test_what_interrupted_saves_left_does_not_count_as_kept(tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=4, checkpoint_every=2)
    (tmp_path / "checkpoints/step-00000005").mkdir()
    (tmp_path / "checkpoints/step-00000005/shard-00000-of-00001.safetensors").write_bytes(b"half")
    fit(Linear(), tmp_path, num_steps=6, checkpoint_every=2, keep_checkpoints=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_another_optimizer_is_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no 'exp_inf' of network.*set optim\.network\.name as it was"):
        fit(Linear(), run, num_steps=9, optim=OptimConfig(name="adamax"))
    assert fit(Linear(), run, num_steps=9, optim=OptimConfig(name="adam")).finished  # of the same state as adamw


def test_a_pickle_is_never_loaded(run: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch exploded",))

    newest = run / "checkpoints/step-00000006"
    shard = next(newest.glob("*.safetensors"))
    torch.save(Bomb(), shard)
    meta = json.loads((newest / "meta.json").read_text())
    import zlib

    content = shard.read_bytes()
    meta["shards"][0] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    (newest / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="damaged"), Reader(str(newest), meta):
        pass
    assert not Path("exploded").exists()


def test_what_an_interrupted_save_left_is_replaced(run: Path) -> None:
    stale = run / "checkpoints/step-00000009"
    shutil.copytree(run / "checkpoints/step-00000006", stale)
    (stale / "meta.json").unlink()
    (stale / "shard-00001-of-00002.safetensors").write_bytes(b"of another size of job")
    fit(Linear(), run, num_steps=9)
    assert sorted(path.name for path in stale.iterdir()) == ["meta.json", "shard-00000-of-00001.safetensors"]


def test_saving_does_not_see_later_changes(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), keep=None)
    tensor = torch.zeros(1000)
    saver.save(1, {tensor_key("param", "a", 0): tensor}, {"images": 0})
    tensor.fill_(1.0)
    saver.close()
    location = str(tmp_path / "checkpoints/step-00000001")
    with Reader(location, storage.read_json(f"{location}/meta.json")) as reader:
        values = torch.ones(1000)
        reader.read("param", "a", 0, values)
        assert values.sum() == 0


def test_a_shard_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        tensor_key("param", "a", 0): torch.randn(5),
        tensor_key("buffer", "count", 0): torch.tensor([2**40]),
        tensor_key("buffer", "flag", 0): torch.tensor([True, False, True]),
        tensor_key("buffer", "half", 0): torch.randn(3).bfloat16(),
        tensor_key("buffer", "nothing", 0): torch.zeros(0),
    }
    saver = Saver(str(tmp_path), keep=None)
    saver.save(1, tensors, {"images": 0})
    tensors = {key: tensor + 1 if tensor.dtype != torch.bool else ~tensor for key, tensor in tensors.items()}
    saver.save(2, tensors, {"images": 0})  # into the same memory
    saver.save(3, tensors | {"param|new|0": torch.ones(2)}, {"images": 0})  # and into other
    saver.close()
    found = load_safetensors((tmp_path / "checkpoints/step-00000002/shard-00000-of-00001.safetensors").read_bytes())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    found = load_safetensors((tmp_path / "checkpoints/step-00000003/shard-00000-of-00001.safetensors").read_bytes())
    assert len(found) == 6


@pytest.mark.parametrize(("order", "best"), [("min", 4), ("max", 2)])
def test_the_best_checkpoint_stays(order: str, best: int, tmp_path: Path) -> None:
    values = {2: 0.9, 4: 0.1, 6: float("nan"), 8: 0.5, 10: 0.4}

    class Judged(Linear):
        def evaluate(self, batch):
            return {"score": torch.tensor(values.get(trainers[-1].step, 0.0))}

    trainers = []
    settings = {"evaluate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 1, "best_metric": "test/score"}
    for num_steps in (6, 10):  # the second goes on from the first
        trainers.append(make_trainer(Judged(), tmp_path, num_steps=num_steps, best_order=order, **settings))
        trainers[-1].fit()
        trainers[-1].close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000010"]
    other = make_trainer(Linear(), tmp_path / "other", num_steps=2, **settings | {"best_metric": "test/other"})
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'test/other'; the evaluation has no metric"):
        other.fit()
    other.close()
