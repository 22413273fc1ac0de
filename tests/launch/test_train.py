"""Training through Ray: the same run as without it, restarts, and one clear line when it fails."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from gmdist.config import Config, from_yaml, load
from gmdist.errors import ConfigError, DataError
from gmdist.launch.train import RunFailedError, train
from gmdist.runs import train_worker
from tests.support import run_workers, tree_bytes

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
    outcome, progress, messages = watch(config_of(digits, tmp_path / "ray", "train.zero_stage=2"))
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


def kill_after(run: Path, step: int, process: bytes) -> threading.Thread:
    """Kill one of Ray's processes once the step's checkpoint is there."""

    def wait() -> None:
        while not (run / f"checkpoints/step-{step:08d}/meta.json").exists():
            time.sleep(0.02)
        me = os.getpid()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != me:
                try:
                    title = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if process in title:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def train_alone(rank: int, world_size: int, config: str) -> None:
    train_worker(from_yaml(config, "config"), torch.device("cpu"))


def test_a_killed_process_is_replaced_and_the_run_ends_the_same(ray_cluster, digits: Path, tmp_path: Path) -> None:
    settings = ["train.num_steps=150", "train.checkpoint_every=25", "train.sample_every=null"]
    killers = [kill_after(tmp_path / "killed", *fate) for fate in ((25, b"RayTrainWorker"), (75, b"ray::Mailbox"))]
    outcome, _, messages = watch(config_of(digits, tmp_path / "killed", *settings))
    for killer in killers:
        killer.join()
    assert outcome.finished
    assert len(messages) == 2
    assert "restart 1 of 3" in messages[0]
    assert "MailboxLost" in messages[1]
    assert "restart 2 of 3" in messages[1]
    assert not (tmp_path / "killed/error.txt").exists()
    run_workers(train_alone, 2, config_of(digits, tmp_path / "whole", *settings).to_yaml())
    assert tree_bytes(tmp_path / "killed/checkpoints") == tree_bytes(tmp_path / "whole/checkpoints")


def test_a_user_error_in_a_worker_is_not_tried_again(ray_cluster, digits: Path, tmp_path: Path) -> None:
    import shutil

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
        ConfigError, match=r"cluster\.num_workers: 8 workers with 16 CPU each need 128; the cluster has"
    ):
        watch(config_of(digits, tmp_path, "cluster.num_workers=8", "cluster.cpus_per_worker=16"))
    with pytest.raises(ConfigError, match=r"2 workers with 1 GPU each need 2; the cluster has 0"):
        watch(config_of(digits, tmp_path, "cluster.gpus_per_worker=1"))
    assert not (tmp_path / "checkpoints").exists()


def test_other_failures_end_after_the_restarts(ray_cluster, digits: Path, tmp_path: Path) -> None:
    # A checkpoint folder that is a file: an error of nobody's making that no restart mends.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()
    messages: list[str] = []
    with pytest.raises((RunFailedError, Exception), match=r"metrics\.jsonl"):
        train(config_of(digits, tmp_path / "run", "cluster.max_failures=1"), lambda p: None, messages.append)
