"""The loop: a family it has never seen, resuming, growing and shrinking, stopping, and what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gmdist.data.mix import Fingerprint
from gmdist.errors import CheckpointError, ConfigError, DataError, MemoryExceededError
from gmdist.families.family import Family, Phase
from gmdist.train.checkpoint import read_meta
from gmdist.train.config import TrainConfig, micro_batch_size
from gmdist.train.hooks import Hooks
from gmdist.train.state import RunIdentity, check_identity
from tests.support import ADAM, Linear, MemorySource, fit, make_trainer, run_workers, small_family, tree_bytes


class StandIn(Family):
    """A family that the trainer knows nothing of: two children, two intervals, a buffer, a worker's own state."""

    averaged = ("scale",)

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Linear(1, 1), nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.replay = torch.zeros(3)

    def phases(self):
        return [Phase("scale", "scale", self.loss), Phase("lazy", "shift", self.loss, every=2)]

    def loss(self, batch, seen):
        self.replay = self.replay + batch["image"].mean()
        value = batch["image"].mean(dim=(1, 2, 3))[:, None]
        loss = (self.shift["a"](self.scale(value)) + self.shift["b"](value) - value).square().mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys, condition=None):
        return self.scale(keys[:, None].float())[:, :, None, None].expand(-1, 1, 4, 4).tanh()

    def after_step(self, seen):
        self.steps += 1
        return {}

    def worker_state(self):
        return {"replay": self.replay.clone()}

    def load_worker_state(self, state):
        self.replay = state["replay"]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_stand_in_trains_and_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = fit(StandIn(), tmp_path / "whole", sample_every=3, num_preview_images=4)
    torch.manual_seed(0)
    fit(StandIn(), tmp_path / "parts", num_steps=3)
    family = StandIn()  # other weights: all come from the checkpoint
    assert fit(family, tmp_path / "parts") == whole
    assert family.steps == 6
    name = "step-00000006"
    assert tree_bytes(tmp_path / "parts/checkpoints" / name) == tree_bytes(tmp_path / "whole/checkpoints" / name)
    assert (tmp_path / "whole/samples/step-00000003.png").exists()
    logged = lines(tmp_path / "whole")
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert {"scale/loss", "lazy/loss", "lr/scale", "images_per_s", "data/wait_s", "order_digest"} <= set(logged[0])
    assert logged[-1]["order_digest"] == whole.digest


def test_lazy_phases_run_at_their_interval(tmp_path: Path) -> None:
    trainer = make_trainer(StandIn(), tmp_path, num_steps=5)
    trainer.fit()
    assert {name: unit.num_updates for name, unit in trainer.units.items()} == {"scale": 5, "shift": 3}
    trainer.close()


def test_metrics_after_the_checkpoint_are_made_again_once(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def die_at_five(progress):
        if progress.step == 5:
            raise KilledError

    fit(Linear(), tmp_path / "whole", log_every=1)
    with pytest.raises(KilledError):
        fit(Linear(), tmp_path / "killed", log_every=1, hooks=Hooks(on_progress=die_at_five))
    assert [line["step"] for line in lines(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "net/lo')  # cut by the kill
    fit(Linear(), tmp_path / "killed", log_every=1)

    def without_speed(run):
        timed = ("images_per_s", "images_per_s_worker", "tflops_worker", "memory_gib", "data/wait_s")
        return [{key: value for key, value in line.items() if key not in timed} for line in lines(run)]

    assert without_speed(tmp_path / "killed") == without_speed(tmp_path / "whole")


def test_a_line_is_the_mean_of_its_steps_wherever_a_resume_cut_its_interval(tmp_path: Path) -> None:
    settings = {"log_every": 4, "checkpoint_every": 1}
    fit(Linear(), tmp_path / "whole", num_steps=4, **settings)
    fit(Linear(), tmp_path / "parts", num_steps=1, **settings)
    fit(Linear(), tmp_path / "parts", num_steps=4, micro_batch_size=2, **settings)
    (expected,), found = lines(tmp_path / "whole"), lines(tmp_path / "parts")[-1]
    for name in ("net/loss", "net/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def evaluate_few(rank: int, world: int, folder: str) -> None:
    calls = []

    class Telling(Linear):
        def evaluate(self, batch):
            calls.append(1)
            return {"number": batch["key"].float().mean()}

    trainer = make_trainer(
        Telling(), Path(folder), rank=rank, world_size=world, batch_size=6, num_steps=2, evaluate_every=2
    )
    trainer.test_data = MemorySource(2, 2, rank, world)  # one worker has nothing to evaluate
    trainer.fit()
    trainer.close()
    assert len(calls) == 1  # there too: shared-out weights are gathered by all workers together


def test_fewer_test_samples_than_workers(tmp_path: Path) -> None:
    run_workers(evaluate_few, 3, str(tmp_path))
    assert lines(tmp_path)[-1]["test/number"] == 0.5


def test_frozen_children_and_buffers_come_back(tmp_path: Path) -> None:
    first = small_family("latent_diffusion", seed=1)
    fit(first, tmp_path, num_steps=3)
    second = small_family("latent_diffusion", seed=2)  # another first stage, another scale
    trainer = make_trainer(second, tmp_path, num_steps=3, seed=0)
    trainer.close()
    assert second.latent_scale == first.latent_scale
    for a, b in zip(first.first_stage.parameters(), second.first_stage.parameters(), strict=True):
        assert torch.equal(a, b)


def lack(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("train_step", "with micro-batches of 8 samples; set train.micro_batch_size=4"),
        ("preview", "at a preview of 40 images; set a smaller train.num_preview_images, or train.sample_every=null"),
        ("evaluate", "with micro-batches of 8 samples; set train.micro_batch_size=4"),
        ("measure", "at an evaluation of generated images; set a smaller evaluation.batch_size"),
    ],
)
def test_a_lack_of_memory_says_what_to_set_wherever_it_is_met(tmp_path: Path, at: str, words: str) -> None:
    trainer = make_trainer(Linear(), tmp_path, sample_every=2, evaluate_every=2)
    trainer.test_data = MemorySource(8, 8)
    trainer._measure = lambda family, beat: {}
    place, name = {"train_step": (trainer, at), "measure": (trainer, "_measure")}.get(at, (trainer.family, at))
    setattr(place, name, lack)
    with pytest.raises(MemoryExceededError, match=rf"^out of memory on worker 0, step [02], {words}$"):
        trainer.fit()
    trainer.close()


def test_a_metric_that_is_a_count_does_not_spoil_checkpoints(tmp_path: Path) -> None:
    class Counting(Linear):
        def summarize(self, means):
            return {"used": 3}

    settings = {"evaluate_every": 2, "checkpoint_every": 2, "best_metric": "test/used"}
    trainer = make_trainer(Counting(), tmp_path, num_steps=2, **settings)
    trainer.test_data = MemorySource(8, 8)
    trainer.fit()
    trainer.close()
    meta = read_meta(str(tmp_path / "checkpoints/step-00000002"))
    assert meta["evaluation"] == {"test/used": 3.0}


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit(Linear(), tmp_path, num_steps=4, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    (folder / "step-00000004/shard-00000-of-00001.safetensors").write_bytes(b"damaged")
    # It goes on from step 3, and is not at step 4 again when it saves.
    fit(Linear(), tmp_path, num_steps=5, checkpoint_every=5, keep_checkpoints=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000005"]


def test_a_stop_leaves_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    stop = {"now": False}
    hooks = Hooks(on_progress=lambda p: stop.update(now=p.step >= 4), stop_requested=lambda: stop["now"])
    outcome = fit(Linear(), tmp_path / "stopped", log_every=1, checkpoint_every=100, hooks=hooks)
    assert not outcome.finished
    assert (outcome.step, outcome.seen) == (4, 32)
    assert (tmp_path / "stopped/checkpoints/step-00000004/meta.json").exists()
    assert fit(Linear(), tmp_path / "stopped", log_every=1) == fit(Linear(), tmp_path / "whole", log_every=1)


def test_dropout_does_not_depend_on_where_a_run_resumed(tmp_path: Path) -> None:
    class WithDropout(Linear):
        def __init__(self):
            super().__init__()
            self.network.insert(1, nn.Dropout(0.5))

    fit(WithDropout(), tmp_path / "whole")
    fit(WithDropout(), tmp_path / "parts", num_steps=3)
    torch.rand(7)
    fit(WithDropout(), tmp_path / "parts")
    assert tree_bytes(tmp_path / "parts/checkpoints") == tree_bytes(tmp_path / "whole/checkpoints")


def test_samples_and_evaluation_use_the_average(tmp_path: Path) -> None:
    values = []

    class Telling(Linear):
        def preview(self, batch):
            values.append(self.network[0].weight.detach().clone())
            assert not self.network.training
            return self.sample(batch["key"])

        def evaluate(self, batch):
            return {"weight": self.network[0].weight[0, 0]}

    trainer = make_trainer(
        Telling(), tmp_path, num_steps=4, sample_every=4, evaluate_every=4, ema_halflife_kimg=1.0, ema_ramp=None
    )
    trainer.fit()
    weight = dict(trainer.family.named_parameters())["network.0.weight"]
    average = next(
        a for f, a in zip(trainer.ema.fragments, trainer.ema.averages, strict=True) if f.name == "network.0.weight"
    )
    assert torch.equal(values[-1].flatten(), average)
    assert not torch.equal(values[-1], weight)
    assert trainer.family.network.training
    trainer.close()
    test_line = next(line for line in lines(tmp_path) if "test/weight" in line)
    assert test_line["test/weight"] == pytest.approx(values[-1][0, 0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"), [({"batch_size": 16}, "data.batch_size was 8"), ({"seed": 1}, "train.seed was 0")]
)
def test_a_run_is_not_resumed_as_another(settings, words, tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=3)
    before = tree_bytes(tmp_path)
    with pytest.raises(DataError, match=words):
        fit(Linear(), tmp_path, **settings)
    assert tree_bytes(tmp_path) == before


def test_another_family_or_data_set_is_refused(tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=3)
    from gmdist.train.checkpoint import find_newest

    found, _ = find_newest(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"of family 'test', the config's is 'ddpm'.*run\.overwrite"):
        check_identity(found, RunIdentity("ddpm", 8), 0)
    other = MemorySource(50, 8).tape
    other.fingerprint.__dict__["manifest"] = "another"
    with pytest.raises(DataError, match="data set was memory"):
        check_identity(found, RunIdentity("test", 8, Fingerprint((1,), (other.fingerprint,))), 0)

    class Wider(Linear):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(256, 9), nn.Tanh(), nn.Linear(9, 1))

    with pytest.raises(CheckpointError, match=r"network\.0\.bias is \[8\] in the checkpoint and \[9\] in the model"):
        fit(Wider(), tmp_path)


def test_micro_batch_sizes() -> None:
    assert micro_batch_size(TrainConfig(1), 12, 3) == 4
    assert micro_batch_size(TrainConfig(1, micro_batch_size=2), 12, 3) == 2
    assert micro_batch_size(TrainConfig(1, micro_batch_size=3), 12, 3) == 2  # the most that divide the part
    assert micro_batch_size(TrainConfig(1, micro_batch_size=8), 12, 3) == 4
    assert micro_batch_size(TrainConfig(1, micro_batch_size=8), 12, 1) == 6
    assert micro_batch_size(TrainConfig(1, micro_batch_size=8), 12, 1, multiple_of=4) == 4
    assert micro_batch_size(TrainConfig(1, micro_batch_size=3), 12, 1, multiple_of=4) == 3  # which is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 4}, "train.zero_stage: 4"),
        ({"offload_optimizer": True}, "train.offload_optimizer: true with train.zero_stage 0"),
        ({"compile": True, "zero_stage": 3}, "train.compile: true with train.zero_stage 3"),
        ({"precision": "fp16"}, "train.precision: 'fp16'"),
        ({"num_steps": 0}, "train.num_steps: 0"),
        ({"keep_checkpoints": 0}, "train.keep_checkpoints: 0"),
        ({"sample_every": 0}, "train.sample_every: 0"),
        ({"num_preview_images": 0}, "train.num_preview_images: 0; must be at least 1$"),
        ({"ema_halflife_kimg": 0.0}, "train.ema_halflife_kimg: 0.0"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**({"num_steps": 1} | changes)).validate()


def test_optimizers_fit_the_family(tmp_path: Path) -> None:
    trainer_of = lambda optim: make_trainer(Linear(), tmp_path, optim=optim)
    trainer_of(ADAM).close()
    from gmdist.train.optim import trained_children

    with pytest.raises(ConfigError, match=r"optim\.network: missing; the family trains network"):
        trained_children(Linear(), {})
    with pytest.raises(ConfigError, match=r"optim\.net: no such child; the family trains network"):
        trained_children(Linear(), {"network": ADAM, "net": ADAM})


def test_quarantined_samples_are_listed(tmp_path: Path) -> None:
    messages = []
    trainer = make_trainer(Linear(), tmp_path, num_steps=2, hooks=Hooks(on_message=messages.append))
    part = trainer.data.part
    bad = {"number": 3, "shard": "shard-000001.tar", "sample": "abc", "reason": "truncated"}

    def with_bad(numbers):
        loaded = part(numbers)
        loaded.quarantined = [bad] if 3 in np.asarray(numbers) else []
        return loaded

    trainer.data.part = with_bad
    trainer.fit()
    trainer.close()
    assert [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()] == [bad]
    assert "shard-000001.tar: abc: truncated" in messages[0]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """An S3 bucket in this process."""
    moto = pytest.importorskip("moto")
    from gmdist import s3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with moto.mock_aws():
        s3.renew_credentials()
        s3.client().create_bucket(Bucket="runs")
        yield "s3://runs"
    s3.renew_credentials()


def test_a_run_in_object_storage_is_the_same_run(bucket: str, tmp_path: Path) -> None:
    from gmdist import storage

    fit(Linear(), f"{bucket}/a", num_steps=3)
    assert fit(Linear(), f"{bucket}/a", keep_checkpoints=1, sample_every=6) == fit(Linear(), tmp_path)
    assert storage.list_names(f"{bucket}/a/checkpoints") == ["step-00000006"]
    assert storage.exists(f"{bucket}/a/samples/step-00000006.png")
    for name in ("shard-00000-of-00001.safetensors", "meta.json"):
        place = f"checkpoints/step-00000006/{name}"
        assert storage.read(f"{bucket}/a/{place}") == (tmp_path / place).read_bytes()
    steps = [json.loads(line)["step"] for line in storage.read(f"{bucket}/a/metrics.jsonl").decode().splitlines()]
    assert steps == [2, 3, 4, 6]
    assert any(name.startswith("events.out.tfevents") for name in storage.list_names(f"{bucket}/a"))


def test_a_line_that_a_stop_cuts_in_two_is_the_same_line(tmp_path: Path) -> None:
    settings = {"log_every": 4, "checkpoint_every": 3, "num_steps": 8}
    fit(Linear(), tmp_path / "whole", **settings)
    fit(Linear(), tmp_path / "parts", **settings | {"num_steps": 3})
    (tmp_path / "parts/metrics.jsonl").unlink()  # the last step of a run has a line; a run that is killed has none
    fit(Linear(), tmp_path / "parts", **settings)
    names = ("step", "net/loss", "net/grad_norm", "order_digest")
    ours, whole = ([[line[name] for name in names] for line in lines(tmp_path / run)] for run in ("parts", "whole"))
    assert ours[1:] == whole[1:]
    assert ours[0][1] == pytest.approx(whole[0][1], rel=1e-12)


class OnAnother(Linear):
    """Has a frozen network, as another run's, and a buffer that it measures: here each worker has its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
        nn.init.constant_(self.frozen.weight, rank)
        self.register_buffer("measured", torch.tensor(0.0))
        self.rank = rank

    def initialize(self, batch):
        self.measured.fill_(self.rank)


def begin_on_another(rank: int, world_size: int, folder: str) -> None:
    family = OnAnother(rank)
    make_trainer(family, Path(folder), rank=rank, world_size=world_size).close()
    assert family.frozen.weight.eq(0.0).all()
    assert family.frozen.weight.is_contiguous(memory_format=torch.channels_last)
    assert family.measured == 0.0


def test_what_no_engine_holds_is_the_same_for_all_workers(tmp_path: Path) -> None:
    run_workers(begin_on_another, 2, str(tmp_path))
