"""Kills a worker that is stuck: a process beside it that waits for signs of progress. Imports next to nothing.

A worker may hang where no exception reaches it: stopped, in a driver of a device, in a collective that nobody else
joins. The pipe between the two tells the watchdog of the worker's end too, whatever it was.
"""

import os
import select
import signal
import subprocess
import sys


class Watchdog:
    """A process that kills this one when it gives no sign for some seconds."""

    def __init__(self, timeout_s: float) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(timeout_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin

    def beat(self) -> None:
        """A sign of progress."""
        os.write(self._pipe.fileno(), b".")

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.wait()


def watch(pid: int, timeout_s: float) -> None:
    """Kill a process when nothing comes from stdin for some seconds; return when stdin ends."""
    while True:
        ready, _, _ = select.select([0], [], [], timeout_s)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            return
        if not os.read(0, 1 << 16):
            return


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]))
