"""How long a run takes to its first step, where the time goes, and how long it stands still when a worker is killed.

    python benchmarks/startup.py

A run of two workers on the digits, as its user starts it. Nothing in it is changed for the measurement: the phases are
told apart by the processes and files that appear.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONFIG = "configs/digits/latent_diffusion.yaml"
AUTOENCODER = "configs/digits/autoencoder_kl.yaml"
SETTINGS = ["train.log_every=1", "train.sample_every=null", "train.evaluate_every=null", "train.checkpoint_every=10"]
POLL_S, DEADLINE_S = 0.01, 120.0
FIRST_STEP_S, RESTART_S = 12.0, 15.0  # asked for


def children(needle: bytes) -> list[int]:
    """The processes below this one that have `needle` in their command line."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
    found = []
    for pid, title in titles.items():
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor and pid != ancestor and needle in title:
            found.append(pid)
    return found


def wait_for(ready: Callable[[], bool], since_s: float) -> float:
    """Seconds since a time until something is ready."""
    while not ready():
        if time.perf_counter() - since_s > DEADLINE_S:
            raise TimeoutError("the run did not get on")
        time.sleep(POLL_S)
    return time.perf_counter() - since_s


def newest_step(run: Path) -> int:
    """The last step that the run has told of."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def measure(arguments: list[str], run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Start a run, kill a worker, stop the run: the times of the phases of both, in seconds."""
    start_s = time.perf_counter()
    process = subprocess.Popen([*arguments, f"run.dir={run}"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # "starting"
        at = {"Python, config": time.perf_counter() - start_s}
        at["Ray starts"] = wait_for(lambda: bool(children(b"ray::Mailbox")), start_s)
        at["Ray Train starts two workers"] = wait_for(lambda: len(children(b"watchdog.py")) == 2, start_s)
        at["imports, engines, data"] = wait_for((run / "config.yaml").exists, start_s)
        at["first step"] = wait_for(lambda: newest_step(run) >= 1, start_s)

        wait_for((run / "checkpoints/step-00000010/meta.json").exists, start_s)
        before = children(b"watchdog.py")
        os.kill(children(b"RayTrainWorker")[0], signal.SIGKILL)
        kill_s = time.perf_counter()
        after = {"old workers end": wait_for(lambda: not set(before) & set(children(b"watchdog.py")), kill_s)}
        after["Ray Train starts two workers"] = wait_for(lambda: len(children(b"watchdog.py")) == 2, kill_s)
        log = (run / "metrics.jsonl").stat().st_ino
        # The log is opened anew, without the lines after the checkpoint, when the state is loaded.
        after["imports, engines, data, loading"] = wait_for(
            lambda: (run / "metrics.jsonl").stat().st_ino != log, kill_s
        )
        step = newest_step(run)
        after["first step"] = wait_for(lambda: newest_step(run) > step, kill_s)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    return at, after


def table(title: str, rounds: list[dict[str, float]], asked_s: float) -> None:
    """Print the median of each phase and of the whole."""
    print(f"\n| {title} | seconds | at |\n|---|---|---|")
    before = 0.0
    for phase in rounds[0]:
        at = statistics.median(times[phase] for times in rounds)
        print(f"| {phase} | {at - before:.1f} | {at:.1f} |")
        before = at
    print(f"asked for: {asked_s:.0f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", type=int, default=1)
    options = parser.parse_args()
    gmdist = str(Path(sys.executable).with_name("gmdist"))
    with tempfile.TemporaryDirectory(prefix="gmdist-startup-") as scratch:
        subprocess.run([gmdist, "data", "make", "digits", f"{scratch}/digits"], check=True, stdout=subprocess.DEVNULL)
        data = [f"data.train={scratch}/digits/train", f"data.test={scratch}/digits/test"]
        command = [gmdist, "train", AUTOENCODER, *SETTINGS, *data, f"train.zero_stage={options.stage}"]
        rounds = [measure(command, Path(scratch, f"run-{number}")) for number in range(options.rounds)]
    table("gmdist train", [first for first, _ in rounds], FIRST_STEP_S)
    table("a worker is killed", [second for _, second in rounds], RESTART_S)


if __name__ == "__main__":
    main()
