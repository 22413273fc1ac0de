"""Whole runs of the command, as a user starts them: killed, interrupted, without space, and as a job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gmdist.config import load
from gmdist.start import train_worker
from tests.faults.nodes import Nodes, environment, processes
from tests.support import tree_bytes

pytestmark = [pytest.mark.ray, pytest.mark.faults]

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/digits/autoencoder_kl.yaml"
SETTINGS = ["family.autoencoder.channels=8", "train.sample_every=null", "train.evaluate_every=null"]
SETTINGS += ["train.num_steps=120", "train.checkpoint_every=20", "train.log_every=10", "data.batch_size=16"]
DEADLINE_S = 240


def command(digits: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={run}"]
    return [sys.executable, "-m", "gmdist.cli", "train", CONFIG, *SETTINGS, *data, *more]


def run_to_end(arguments: list[str], settings: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=settings or environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def start(arguments: list[str], settings: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command as the leader of a process group, as a terminal does."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=settings or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing happens to, and its output."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run_to_end(command(digits, run))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return run, ended.stdout


def digest_of(output: str) -> str:
    return output.rpartition("order digest ")[2].split()[0]


def test_output_is_quiet_and_tells_the_progress(undisturbed: tuple[Path, str]) -> None:
    lines = undisturbed[1].splitlines()
    assert all(line.startswith("autoencoder_kl: ") for line in lines), lines
    assert any("images/s" in line and "loss" in line and "left" in line for line in lines)
    assert "step 120, 1920 images, order digest" in lines[-1]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has told of a step after this one."""
    deadline = time.monotonic() + DEADLINE_S
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or max((line["step"] for line in read_lines(metrics)), default=0) <= step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_an_interrupted_and_killed_run_ends_with_the_same_bits(digits: Path, tmp_path: Path, undisturbed) -> None:
    run, step = tmp_path / "run", 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = start(command(digits, run))
        wait_for_step(run, step, process)
        if number == signal.SIGKILL:
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)  # a terminal and a batch system signal the whole group
        output, _ = process.communicate(timeout=DEADLINE_S)
        reached = max(int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/*/meta.json"))
        if number != signal.SIGKILL:
            assert process.returncode == 130, output
            assert "stopped, the same command goes on from here" in output
            assert "Traceback" not in output
            assert reached > step
        step = reached
        assert step < 120
    ended = run_to_end(command(digits, run))
    assert ended.returncode == 0, ended.stderr
    assert tree_bytes(run / "checkpoints") == tree_bytes(undisturbed[0] / "checkpoints")
    assert digest_of(ended.stdout) == digest_of(undisturbed[1])


def wait_for_child(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Wait until a command has a process of this name; returns all that it has."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in child.name() for child in children):
                return children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("started", ["gcs_server", "raylet", "ray::"])  # in the middle of Ray's start, and after it
def test_a_signal_while_ray_starts_ends_the_command(digits: Path, tmp_path: Path, number: int, started: str) -> None:
    process = start(command(digits, tmp_path / "run"))
    assert process.stdout.readline() == "autoencoder_kl: starting\n"
    children = wait_for_child(process, started)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "gmdist: stopped"
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
    assert not psutil.wait_procs(children, timeout=DEADLINE_S)[1]


def test_a_command_that_is_killed_while_its_workers_are_born_leaves_their_room(
    digits: Path, tmp_path: Path, undisturbed
) -> None:
    run = tmp_path / "run"
    with Nodes(num_cpus=2) as nodes:
        arguments = command(digits, run, f"cluster.address={nodes.address}")
        process = start(arguments, nodes.settings)
        deadline = time.monotonic() + DEADLINE_S
        while not processes(b"ray::RayTrainWorker"):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        ended = run_to_end(arguments, nodes.settings)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "restart" not in ended.stdout
    assert tree_bytes(run / "checkpoints") == tree_bytes(undisturbed[0] / "checkpoints")


def go_on(digits: Path, run: Path, *more: str) -> str:
    """Go on with a run in this process, as one worker without Ray, and return the digest at its end."""
    _, _, _, _, path, *overrides = command(digits, run, *more)
    settings = ["cluster.num_workers=1", "train.zero_stage=0"]
    return train_worker(load(str(ROOT / path), [*overrides, *settings]), torch.device("cpu")).digest


def test_a_full_disk_is_said_and_loses_nothing(digits: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a user mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    # A checkpoint is about 1 MB: the first fits, the second does not.
    script = f'mount -t tmpfs -o size=1800k tmpfs {disk} && "$@"; code=$?; cp -r {disk}/run {tmp_path}/left; exit $code'
    small = command(digits, disk / "run", "train.keep_checkpoints=null", "cluster.num_workers=1")
    ended = run_to_end(["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *small])
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert "No space left on device; free some space" in line
    assert "checkpoints/step-" in line
    assert "earlier checkpoints are as they were" in line
    # What was complete before is still sound: with more space the run goes on from it.
    assert (tmp_path / "left/checkpoints/step-00000020/meta.json").exists()
    assert go_on(digits, tmp_path / "left", "train.num_steps=30") == go_on(
        digits, tmp_path / "whole", "train.num_steps=30"
    )


def submitted(nodes: Nodes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A call of `ray job`."""
    return subprocess.run(
        [nodes.command("ray"), "job", arguments[0], "--address", nodes.dashboard, *arguments[1:]],
        env=nodes.settings,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_a_job_that_is_stopped_and_submitted_again_is_the_same_run(digits: Path, tmp_path: Path, undisturbed) -> None:
    job = ["--working-dir", str(ROOT), "--", "exec", "python", "jobs/train.py", *command(digits, tmp_path / "run")[4:]]
    with Nodes(num_cpus=2) as nodes:
        assert submitted(nodes, "submit", "--no-wait", "--submission-id", "first", *job).returncode == 0
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + DEADLINE_S
        while not metrics.exists() or not read_lines(metrics):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stopped = submitted(nodes, "stop", "first")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert "stopped, the same command goes on from here" in submitted(nodes, "logs", "first").stdout
        ended = submitted(nodes, "submit", *job)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    output = next(line for line in ended.stdout.splitlines() if "order digest" in line)
    assert digest_of(output) == digest_of(undisturbed[1])
    name = "checkpoints/step-00000120"
    assert tree_bytes(tmp_path / "run" / name) == tree_bytes(undisturbed[0] / name)
