"""A worker that gives no sign is killed; one that does, or ends, is left alone, and the watchdog ends with it."""

import os
import signal
import subprocess
import sys
import time

import psutil

LIVES = """
import sys, time
from gmdist.launch.watchdog import Watchdog
watchdog = Watchdog(float(sys.argv[1]))
print(watchdog._process.pid, flush=True)
for _ in range(int(sys.argv[2])):
    watchdog.beat()
    time.sleep(0.1)
if sys.argv[3] == "hang":
    time.sleep(600)
watchdog.close()
"""


def start(timeout_s: float, beats: int, then: str = "") -> tuple["subprocess.Popen[str]", int]:
    worker = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(timeout_s), str(beats), then], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    return worker, int(worker.stdout.readline())


def has_ended(pid: int) -> bool:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_worker_that_goes_on_is_left_alone() -> None:
    worker, watchdog = start(3.0, 40)  # a sign every 0.1 s, for longer than that
    assert worker.wait(timeout=60) == 0
    assert has_ended(watchdog)


def test_a_worker_that_hangs_is_killed() -> None:
    worker, watchdog = start(0.5, 2, "hang")
    assert worker.wait(timeout=60) == -signal.SIGKILL
    assert has_ended(watchdog)


def test_a_worker_that_is_stopped_is_killed() -> None:
    worker, _ = start(1.0, 600)
    os.kill(worker.pid, signal.SIGSTOP)
    assert worker.wait(timeout=60) == -signal.SIGKILL


def test_the_watchdog_ends_with_a_worker_that_is_killed() -> None:
    worker, watchdog = start(600.0, 600)
    worker.kill()
    worker.wait()
    assert has_ended(watchdog)
