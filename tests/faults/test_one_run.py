"""One run through Ray that everything happens to: it ends with the bits of an undisturbed one."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmdist.config import Config, from_yaml, load
from gmdist.data.batch import Loaded
from gmdist.launch import attempt
from gmdist.launch.train import train
from gmdist.launch.worker import work
from gmdist.start import train_worker
from gmdist.train.trainer import Trainer
from tests.faults.nodes import processes
from tests.support import run_workers, tree_bytes

pytestmark = [pytest.mark.ray, pytest.mark.faults]

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/autoencoder_kl.yaml")
SETTINGS = ["family.autoencoder.channels=8", "train.sample_every=null", "train.num_steps=270", "data.batch_size=16"]
SETTINGS += ["train.evaluate_every=30", "train.best_metric=test/l1", "train.checkpoint_every=30", "train.log_every=10"]
SETTINGS += ["cluster.timeout_s=16", "cluster.backoff_s=0.1"]
RAISES_AT = 20
WORKER = b"ray::RayTrainWorker"
NAN_SAMPLE = 1000  # of step 62


def poison() -> None:
    """Let one sample be NaN, in this process."""
    batch_on = Loaded.batch_on

    def poisoned(self: Loaded, device: torch.device) -> dict[str, torch.Tensor]:
        batch = batch_on(self, device)
        batch["image"][batch["key"] == NAN_SAMPLE] = torch.nan
        return batch

    Loaded.batch_on = poisoned


def faulty_work(settings: dict[str, Any]) -> Any:
    """What each worker runs: once, one of them raises in the middle of a step."""
    poison()
    train_step = Trainer.train_step
    marker = Path(from_yaml(settings["config"], "config").run.dir, "has-raised")

    def faulty_step(self: Trainer, loaded: Any) -> None:
        if self.step == RAISES_AT and torch.distributed.get_rank() == 1 and not marker.exists():
            marker.touch()
            raise RuntimeError("a fault of the test")
        train_step(self, loaded)

    Trainer.train_step = faulty_step
    try:
        return work(settings)
    finally:
        Trainer.train_step = train_step


def undisturbed(rank: int, world_size: int, config: str) -> None:
    poison()
    train_worker(from_yaml(config, "config"), torch.device("cpu"))


def send(number: int, title: bytes) -> Callable[[Path], None]:
    """A fault: a signal to one of Ray's processes."""
    return lambda run: os.kill(max(processes(title)), number)


def corrupt_and_kill(run: Path) -> None:
    newest = max(run.glob("checkpoints/*/meta.json")).parent
    shard = min(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    send(signal.SIGKILL, WORKER)(run)


DIED = "a worker does not answer: killed, out of memory, stuck for cluster.timeout_s, or its machine lost"
# At the step of a checkpoint: a fault, and what the user reads of it.
FAULTS: dict[int, tuple[Callable[[Path], None], str]] = {
    60: (send(signal.SIGKILL, WORKER), DIED),
    120: (send(signal.SIGSTOP, WORKER), DIED),
    180: (send(signal.SIGKILL, b"ray::Mailbox"), "the process between the command and its workers died"),
    240: (corrupt_and_kill, DIED),
}


def disturb(run: Path, done: list[int], ended: threading.Event) -> None:
    def wait_until(ready: Callable[[], object]) -> bool:
        """False when all is over."""
        while not ready():
            if ended.wait(0.01):
                return False
        return True

    if not wait_until(lambda: processes(WORKER)):
        return
    send(signal.SIGKILL, WORKER)(run)  # before it has done anything
    for step, (fault, _) in FAULTS.items():
        if not wait_until((run / f"checkpoints/step-{step:08d}/meta.json").exists):
            return
        fault(run)
        done.append(step)


def config_of(digits: Path, run: Path) -> Config:
    return load(CONFIG, [*SETTINGS, f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={run}"])


def test_a_run_that_everything_happens_to_ends_with_the_same_bits(
    ray_cluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "disturbed"
    monkeypatch.setattr(attempt, "work", faulty_work)
    messages: list[str] = []
    done: list[int] = []
    ended = threading.Event()
    thread = threading.Thread(target=disturb, args=(run, done, ended))
    thread.start()
    try:
        outcome = train(
            config_of(digits, run),
            lambda progress: None,
            messages.append,
        )
    finally:
        ended.set()
        thread.join()
    assert outcome.finished
    assert done == list(FAULTS), messages
    restarts = [message for message in messages if "restart " in message]
    expected = [DIED, "RuntimeError: a fault of the test", *(words for _, words in FAULTS.values())]
    assert len(restarts) == len(expected), messages
    for message, words in zip(restarts, expected, strict=True):
        assert "restart 1 of 3" in message
        assert words in message
    skipped = [message for message in messages if "skipped an unusable checkpoint" in message]
    assert len(skipped) == 1
    assert "crc32 differs" in skipped[0]
    assert not (run / "error.txt").exists()

    run_workers(undisturbed, 2, config_of(digits, tmp_path / "whole").to_yaml())
    assert tree_bytes(run / "checkpoints") == tree_bytes(tmp_path / "whole/checkpoints")
    ours, whole = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "whole")
    )
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    assert ours[-2]["skipped_steps"] == whole[-2]["skipped_steps"] == 1
