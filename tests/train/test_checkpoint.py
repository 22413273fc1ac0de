"""Checkpoints: complete or skipped, kept by count, and nothing lost when a save fails."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from gmdist import storage
from gmdist.errors import CheckpointError, ConfigError
from gmdist.train import checkpoint
from gmdist.train.checkpoint import Reader, find_newest, tensor_key
from gmdist.train.optim import OptimConfig
from gmdist.train.saver import Saver
from tests.support import Linear, fit, make_trainer, tree_bytes


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
    with pytest.raises(CheckpointError, match=r"step-00000009.*No space left on device; free some space") as caught:
        fit(Linear(), run, num_steps=12)
    assert "\n" not in str(caught.value)
    assert tree_bytes(run / "checkpoints") == before  # the half-written one is gone
    monkeypatch.undo()
    assert fit(Linear(), run, num_steps=12).finished


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
    with Reader(location, checkpoint.read_meta(location)) as reader:
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
            return {"score": torch.tensor(values[trainers[-1].step])}

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
