"""What a worker checks before it begins, and how it stays in touch with the driver."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RaySystemError

from gmdist import storage
from gmdist.config import load
from gmdist.errors import ConfigError, StorageError
from gmdist.launch import worker
from gmdist.launch.lease import LEASE_NAME
from gmdist.launch.mailbox import Failure, Wishes
from gmdist.launch.shard_workers import device_of
from gmdist.launch.worker import _correspondence, check_reach

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/autoencoder_kl.yaml")


def test_a_run_folder_that_only_the_driver_sees_is_refused(tmp_path: Path) -> None:
    config = load(CONFIG, [f"run.dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"run\.dir: .*/run; a worker on .* does not see .* a shared folder or s3://"):
        check_reach(config)
    storage.write(f"{tmp_path}/run/{LEASE_NAME}", b"{}")
    check_reach(config)


def test_without_gpus_a_worker_leaves_those_of_its_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert device_of(load(CONFIG, [])).type == "cpu"
    assert str(device_of(load(CONFIG, ["cluster.gpus_per_worker=1"]))) == "cuda:3"


def mailbox(monkeypatch: pytest.MonkeyPatch, exchange: Callable[..., Any]) -> Any:
    """A mailbox without Ray, that answers as told."""
    monkeypatch.setattr(worker.ray, "get", lambda answer: answer())
    monkeypatch.setattr(worker, "_POLL_S", 0.001)
    remote = SimpleNamespace(remote=lambda progress, messages: lambda: exchange(progress, messages))
    return SimpleNamespace(exchange=remote)


def test_a_fault_of_rays_loses_no_message_and_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    faults = [RaySystemError("for a moment")] * 2
    stopped = threading.Event()

    def exchange(progress: Any, messages: list[str]) -> Wishes:
        if messages and faults:
            raise faults.pop()
        told.extend(messages)
        if messages:
            stopped.set()
        return Wishes(stop=bool(messages))

    with _correspondence(mailbox(monkeypatch, exchange)) as hooks:
        hooks.on_message("replaced a sample")
        assert stopped.wait(10.0)
    assert told == ["replaced a sample"]
    assert hooks.stop_requested()


def test_a_mailbox_that_is_gone_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(progress: Any, messages: list[str]) -> Wishes:
        raise RayActorError

    with pytest.raises(ValueError, match="the work's own"), _correspondence(mailbox(monkeypatch, gone)):
        raise ValueError("the work's own")


def test_an_error_of_the_users_is_one_whatever_its_class() -> None:
    error = storage.NotAFileError("s3://bucket/x: a folder; name a file")
    again = Failure.of(error, "trace").for_user()
    assert type(again) is StorageError
    assert str(again) == str(error)
    assert Failure.of(RuntimeError("one\ntwo"), "trace") == Failure("RuntimeError", "one", "trace")
    assert Failure.of(RuntimeError("one"), "trace").for_user() is None
