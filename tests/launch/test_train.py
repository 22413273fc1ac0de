"""Training through Ray: the same run as without it, restarts, and one clear line when it fails."""

import json
import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import ControllerError

from gmdist.config import Config, load
from gmdist.errors import ConfigError, DataError, FolderLostError, MemoryExceededError, RunFailedError
from gmdist.launch import attempt, lease
from gmdist.launch.mailbox import Failure, WorkersFailedError
from gmdist.launch.train import _with_restarts, train
from gmdist.launch.watch import Stopper
from gmdist.launch.worker import work
from gmdist.start import train_worker
from gmdist.train.hooks import Outcome, Progress
from gmdist.train.trainer import Trainer

pytestmark = pytest.mark.ray

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/autoencoder_kl.yaml")
TINY = ["family.autoencoder.channels=8", "train.sample_every=4", "train.evaluate_every=null", "train.num_steps=8"]
TINY += ["train.checkpoint_every=2", "train.log_every=2", "train.num_preview_images=4", "data.batch_size=8"]


def config_of(digits: Path, run: Path, *more: str) -> Config:
    return load(CONFIG, [*TINY, f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={run}", *more])


def watch(config: Config):
    progress, messages = [], []
    outcome = train(config, progress.append, messages.append)
    return outcome, progress, messages


def test_two_workers_and_zero_end_as_one_process_does(ray_cluster, digits: Path, tmp_path: Path) -> None:
    handlers = list(logging.getLogger("ray.train").handlers)
    outcome, progress, messages = watch(config_of(digits, tmp_path / "ray", "train.zero_stage=2"))
    # Set up anew while the controller of another run in this process logs, they would wait for each other for ever.
    assert logging.getLogger("ray.train").handlers == handlers
    assert outcome.finished
    assert messages == []
    assert progress[-1].step == 8
    assert progress[-1].images_per_s > 0
    alone = train_worker(
        config_of(digits, tmp_path / "alone", "train.zero_stage=0", "cluster.num_workers=1"), torch.device("cpu")
    )
    assert outcome == alone
    for ours, theirs in zip(*(lines(tmp_path / name) for name in ("ray", "alone")), strict=True):
        assert ours["order_digest"] == theirs["order_digest"]
        assert ours["autoencoder/loss"] == pytest.approx(theirs["autoencoder/loss"], rel=1e-4)
    written = {path.name for path in (tmp_path / "ray").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples"} <= written
    assert any(name.startswith("events.out.tfevents") for name in written)
    assert (tmp_path / "ray/samples/step-00000008.png").exists()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_user_error_in_a_worker_is_not_tried_again(ray_cluster, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "data")
    shard = tmp_path / "data/shard-000003.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    messages: list[str] = []
    with pytest.raises(DataError, match=r"shard-000003.tar: sample '\d+' is not what was indexed") as caught:
        train(
            config_of(digits, tmp_path / "run", f"data.train={tmp_path}/data", "train.num_steps=400"),
            lambda p: None,
            messages.append,
        )
    assert "\n" not in str(caught.value)
    assert messages == []
    assert "Traceback" in (tmp_path / "run/error.txt").read_text()


def test_too_few_cpus_are_said_at_once(ray_cluster, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cluster\.cpus_per_worker: 8 workers with 16 CPU each need 128; this machine has"
    ):
        watch(config_of(digits, tmp_path, "cluster.num_workers=8", "cluster.cpus_per_worker=16"))
    with pytest.raises(ConfigError, match=r"2 workers with 1 GPU each need 2; this machine has 0"):
        watch(config_of(digits, tmp_path, "cluster.gpus_per_worker=1"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_trial_of_a_sweep_waits_for_machines_that_were_lost(ray_cluster, digits: Path, tmp_path: Path) -> None:
    stopper = Stopper(print)
    messages: list[str] = []

    def tell(message: str) -> None:
        messages.append(message)
        stopper.ask()

    with pytest.raises(KeyboardInterrupt):
        train(config_of(digits, tmp_path, "cluster.num_workers=4"), print, tell, stopper=stopper)
    assert messages == ["waiting: the run needs 4 workers, and the cluster has room for 2"]


def test_the_folder_of_a_sweep_is_no_runs(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").touch()
    with pytest.raises(ConfigError, match=rf"^run\.dir: {tmp_path}; holds a sweep \(sweep\.json\); choose another"):
        watch(config_of(digits, tmp_path))


def test_what_a_task_of_rays_raised_is_said_without_its_colours() -> None:
    raised = RayTaskError("work", "\x1b[36mray::work()\x1b[39m (pid=1)", DataError("data.train: damaged"))
    failure = attempt._explain(ControllerError(raised.as_instanceof_cause()))
    assert (failure.kind, failure.message) == ("DataError", "data.train: damaged")
    assert isinstance(failure.for_user(), DataError)


def test_other_failures_end_after_the_restarts(ray_cluster, digits: Path, tmp_path: Path) -> None:
    # A checkpoint folder that is a file: an error of nobody's making that no restart mends.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()
    messages: list[str] = []
    with pytest.raises((RunFailedError, Exception), match=r"metrics\.jsonl"):
        train(config_of(digits, tmp_path / "run", "cluster.max_failures=1"), lambda p: None, messages.append)


def test_a_run_whose_folder_another_command_takes_ends_and_saves_nothing(
    ray_cluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEWED_S", 0.2)
    run = tmp_path / "run"
    config = config_of(digits, run, "train.num_steps=100000", "train.checkpoint_every=50000", "train.sample_every=null")

    def take(progress: Progress) -> None:
        other = json.loads((run / "lease.json").read_text()) | {"id": "another"}
        (run / "lease.json").write_text(json.dumps(other))

    messages: list[str] = []
    with pytest.raises(FolderLostError, match=f"{run}: another command has taken the folder"):
        train(config, take, messages.append)
    assert messages == []
    assert not (run / "checkpoints").exists()
    assert json.loads((run / "lease.json").read_text())["id"] == "another"


@pytest.mark.parametrize(
    ("saved", "restarts"), [([0, 40, 80, 120, 160], 4), ([0, 0, 40, 40, 40], 3), ([40, 40, 40, 40, 40], 2)]
)
def test_what_is_saved_is_progress(
    saved: list[int], restarts: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each start and each failure the newest checkpoint is of another step, or not; none of it is logged."""
    at = iter(saved)
    monkeypatch.setattr("gmdist.launch.train._saved_step", lambda config: next(at))

    def fail(*_: Any) -> Outcome:
        raise WorkersFailedError(Failure(attempt.LOST, "a machine was lost", "trace"))

    monkeypatch.setattr(attempt, "attempt", fail)
    monkeypatch.setattr("gmdist.launch.train.choose_size", lambda *_: 1)
    messages: list[str] = []
    config = config_of(digits, tmp_path, "cluster.max_failures=2", "cluster.backoff_s=0")
    with pytest.raises((RunFailedError, StopIteration)):
        _with_restarts(config, messages.append, messages.append, None, Stopper(messages.append))
    assert len(messages) == restarts


def work_with_little_memory(settings: dict[str, Any]) -> Any:
    """What each worker runs: it can have hardly more memory than before its first step."""
    train_step = Trainer.train_step

    def limited(self: Trainer, loaded: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, resource.RLIM_INFINITY))
        train_step(self, loaded)

    Trainer.train_step = limited
    return work(settings)


def test_a_lack_of_memory_says_what_to_set(
    ray_cluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "work", work_with_little_memory)
    large = ["family.autoencoder.channels=64", "data.batch_size=512", "cluster.num_workers=1"]
    messages: list[str] = []
    with pytest.raises(
        MemoryExceededError,
        match=r"out of memory on worker 0, step 0, with micro-batches of 512 samples; set train\.micro_batch_size=256",
    ):
        train(config_of(digits, tmp_path, *large), lambda progress: None, messages.append)
    assert messages == []
