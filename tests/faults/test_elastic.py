"""A run on a cluster whose nodes die, come and are taken away: the order of the undisturbed run, and its losses."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmdist.train.checkpoint import find_newest
from tests.faults.nodes import Nodes
from tests.faults.test_cli_runs import read_lines, run_to_end

pytestmark = pytest.mark.faults

DEADLINE_S = 100
WINDOW = 50  # steps after each change
# Nothing in it makes much of a rounding: neither a loss with a kink, nor dropout, whose masks depend on the worker.
CONFIG = """
name: elastic
family:
  name: ddpm
  unet: {{channels: 8, multipliers: [1, 2, 2], num_res_blocks: 1, attention_levels: [2], num_heads: 2, dropout: 0.0}}
  diffusion: {{schedule: cosine, prediction: v}}
data: {{train: {data}/train, image_size: 32, channels: 1, num_classes: 10, batch_size: 16}}
optim: {{denoiser: {{lr: 3.0e-4, betas: [0.9, 0.99], warmup_steps: 20}}}}
train: {{num_steps: 100000, zero_stage: 1, log_every: 1, checkpoint_every: 50, sample_every: null}}
run: {{dir: {data}/run}}
"""


class Watched:
    """A command whose lines are kept as they come."""

    def __init__(self, arguments: list[str], settings: dict[str, str]) -> None:
        self.lines: list[str] = []
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
        assert changed["denoiser/loss"] == pytest.approx(line["denoiser/loss"], rel=1e-4), line["step"]


def test_nodes_come_and_go(digits: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "elastic.yaml"
    config.write_text(CONFIG.format(data=digits))
    train = [sys.executable, "-m", "gmdist.cli", "train", str(config)]
    with Nodes(num_cpus=0) as nodes:
        nodes.add(1)
        nodes.add(1)
        elastic = ["cluster.num_workers=[1,2]", f"cluster.address={nodes.address}", f"run.dir={run}"]
        watched = Watched([*train, *elastic], nodes.settings)

        def go_on() -> None:
            step = newest_step(run)
            watched.wait_for(lambda: newest_step(run) >= step + WINDOW, f"{WINDOW} steps after {step}")

        watched.wait_for(lambda: num_workers(run) == 2, "two workers")
        go_on()
        nodes.kill(-1)
        watched.wait_for_lines("going on with 1 workers instead of 2")
        go_on()
        spot = nodes.add(1)
        watched.wait_for_lines("the cluster has room for 2 workers: saving a checkpoint, to go on with more")
        watched.wait_for_lines("going on with 2 workers instead of 1")
        go_on()
        nodes.announce_end(spot, in_s=60)
        watched.wait_for_lines("a machine will be taken away: saving a checkpoint")
        told_at = newest_step(run)
        watched.wait_for(lambda: find_newest(str(run))[0].meta["step"] >= told_at - 5, "the checkpoint")
        nodes.kill(-1)
        watched.wait_for_lines("going on with 1 workers instead of 2", count=2)
        go_on()
        watched.process.send_signal(signal.SIGTERM)
        assert watched.process.wait(DEADLINE_S) == 130, "".join(watched.lines)
    check_same_run(run, train, tmp_path / "whole")
