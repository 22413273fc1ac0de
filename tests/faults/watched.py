"""A command that trains on nodes of Ray that come and go, watched: shared by the tests of faults and of clusters."""

import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.faults.test_cli_runs import read_lines, run_to_end

DEADLINE_S = 100
# Nothing in it makes much of a rounding: neither a loss with a kink, nor dropout, whose masks depend on the worker.
CONFIG = """
name: elastic
family:
  name: ddpm
  unet: {{channels: 8, multipliers: [1, 2, 2], num_res_blocks: 1, attention_levels: [2], num_heads: 2, dropout: 0.0}}
  diffusion: {{schedule: cosine, prediction: v}}
data: {{train: {data}/train, image_size: 32, channels: 1, num_classes: 10, batch_size: 16}}
optim: {{denoiser: {{lr: 1.0e-4, betas: [0.9, 0.99], warmup_steps: 20}}}}
train: {{num_steps: 100000, zero_stage: 1, log_every: 1, checkpoint_every: 50, sample_every: null}}
run: {{dir: {data}/run}}
"""


class Watched:
    """A command whose lines are kept as they come."""

    def __init__(self, arguments: list[str], run: Path, settings: dict[str, str]) -> None:
        self.run, self.lines = run, list[str]()
        self.process = subprocess.Popen(
            arguments, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += self.process.stdout

    def wait_for(self, ready, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, f"{what}\n{self.lines}"
            time.sleep(0.05)

    def wait_for_lines(self, words: str, count: int = 1) -> None:
        self.wait_for(lambda: sum(words in line for line in self.lines) >= count, words)

    def wait_for_workers(self, count: int) -> None:
        self.wait_for(lambda: num_workers(self.run) == count, f"{count} workers")

    def go_on(self, steps: int) -> None:
        """Wait until it has made so many more."""
        start = newest_step(self.run)
        self.wait_for(lambda: newest_step(self.run) >= start + steps, f"{steps} steps after {start}")

    def stop(self) -> None:
        """As a user does; it has to end as a stopped run."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_S) == 130, "".join(self.lines)


def num_workers(run: Path) -> int:
    """How many made the newest line."""
    path = run / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return round(lines[-1]["images_per_s"] / lines[-1]["images_per_s_worker"]) if lines else 0


def newest_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_lines(path)), default=0) if path.exists() else 0


def check_same_run(run: Path, train: list[str], whole: Path) -> None:
    """The run saw the samples of one that nothing happened to, in the same order, and had its losses."""
    steps = newest_step(run)
    ended = run_to_end([*train, f"train.num_steps={steps}", "cluster.num_workers=1", f"run.dir={whole}"])
    assert ended.returncode == 0, ended.stderr
    ours, undisturbed = (read_lines(folder / "metrics.jsonl") for folder in (run, whole))
    assert [line["step"] for line in ours] == [line["step"] for line in undisturbed] == list(range(1, steps + 1))
    assert [line["order_digest"] for line in ours] == [line["order_digest"] for line in undisturbed]
    for changed, line in zip(ours, undisturbed, strict=True):
        # Other numbers of workers round otherwise, by 2e-7; at three times the learning rate training makes 1e-4 of it.
        assert changed["denoiser/loss"] == pytest.approx(line["denoiser/loss"], rel=1e-5), line["step"]
