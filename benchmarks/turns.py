"""Sides that take turns: each a process of its own with one thread, a step at a time."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gmdist.train.cost import peak_memory_gib

# As Ray's workers have it: large temporaries come from the heap and stay there.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


@dataclasses.dataclass
class Peer:
    """A side's process, and what it has said; what it did first is not counted."""

    process: subprocess.Popen[str]
    seconds: list[float] = dataclasses.field(default_factory=list)
    values: list[Any] = dataclasses.field(default_factory=list)
    gib: float = 0.0

    def wait(self) -> None:
        """Until it has its weights."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"it did not start; run it to see why: {self.process.args}")

    def step(self, is_counted: bool) -> None:
        """Let it make one."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.values.append(answer["value"])
        self.gib = answer["gib"]
        if is_counted:
            self.seconds.append(answer["s"])

    def end(self) -> None:
        """Wait until it is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def median_s(self) -> float:
        """Of the counted steps."""
        return statistics.median(self.seconds)


def serve(step: Callable[[], Any]) -> None:
    """One side: a step for each line of the input, and for each a line of the processor's time and what it gave."""
    print("ready", flush=True)
    for _ in sys.stdin:
        start_s = time.process_time()
        value = step()
        taken_s = time.process_time() - start_s
        print(json.dumps({"s": taken_s, "value": value, "gib": peak_memory_gib(torch.device("cpu"))}), flush=True)


def start(script: str, arguments: list[str], *, our_allocator: bool, peers: Path | None) -> Peer:
    """A side that gets ready, as `script --work ARGUMENTS`; `peers`: the folder that others' packages are in."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if peers is not None:
        earlier = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(peers.absolute()), *earlier])
    if our_allocator:
        environment |= ALLOCATOR
    process = subprocess.Popen(
        [sys.executable, script, "--work", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return Peer(process)


def take_turns(found: dict[str, Peer], rounds: int, *, is_warm: bool) -> None:
    """A step each, again and again; unless they are warm, one before anything is counted."""
    for peer in found.values():
        peer.wait()
    for number in range(rounds if is_warm else rounds + 1):
        for peer in found.values():
            peer.step(is_counted=is_warm or number > 0)
    for peer in found.values():
        peer.end()


def ratio(ours: Peer, theirs: Peer) -> float:
    """Of their times, turn by turn."""
    return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def difference(first: Peer, second: Peer, num_values: int | None = None) -> float:
    """The largest relative one of the first losses; None: of all."""
    pairs = list(zip(first.values, second.values, strict=True))[:num_values]
    return max(abs(a - b) / abs(b) for a, b in pairs)
