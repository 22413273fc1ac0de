"""A Slurm of two nodes on this machine, each a slurmd with a host name and a network of its own. Needs root.

`make slurm` runs it: it prints what reaches it and serves until it is told to stop.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
ROOT = Path(__file__).parent.parent.parent.parent
NAMES = ("n1", "n2")
INTERFACE = "slurm0"  # of a node, in its own network
LOCAL = "/mnt"  # where each node has a disk of its own
START_S = 60.0

CONF = """
ClusterName=gmdist
SlurmctldHost=controller({network}.254)
SlurmctldPort={port}
SlurmdPort=6818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=20
ReturnToService=2
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What this machine lacks."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if os.geteuid() != 0:
        lacking.append("root")
    elif not lacking and subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        lacking.append("the right to make network namespaces, which containers seldom have")
    return lacking


class Slurm:
    """The cluster; a context manager. Its folder, networks and processes are gone afterwards."""

    def __init__(self, cpus_per_node: int = 2) -> None:
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._undo = contextlib.ExitStack()  # last things first, each of them even where another one fails
        self.root = Path(tempfile.mkdtemp(prefix="gmdist-slurm-"))
        self._undo.callback(shutil.rmtree, self.root, ignore_errors=True)
        self.root.chmod(0o755)  # munged's own demand
        # Other tests may be here: the names and the addresses are this process's.
        number = os.getpid()
        self._bridge = f"gms{number}"
        self._namespaces = {name: f"gms{number}-{name}" for name in NAMES}
        self._network = f"10.{200 + number // 256 % 50}.{number % 256}"
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={self._network}.{position} CPUs={cpus_per_node} RealMemory=8000 State=UNKNOWN"
            for position, name in enumerate(NAMES, start=1)
        )
        conf = CONF.format(root=self.root, port=_free_port(), network=self._network, nodes=nodes, names=",".join(NAMES))
        (self.root / "slurm.conf").write_text(conf)
        paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.settings = {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": paths}
        self.settings |= {"GLOO_SOCKET_IFNAME": INTERFACE, "GMDIST_LOCAL": LOCAL}

    def __enter__(self) -> "Slurm":
        try:
            self._make_networks()
            self._start_daemons()
            self._wait_until_idle()
        except BaseException:
            self._undo.close()
            raise
        self._undo.callback(self._end_jobs)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _end_jobs(self) -> None:
        self.command("scancel", "--user=root", check=False)
        deadline = time.monotonic() + START_S
        while self.command("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)

    def command(self, *arguments: str, more: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Run a command of Slurm's, on the controller's side; returns what it printed."""
        environment = self._environment() | dict(more or {})
        ended = subprocess.run(
            arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout.strip()

    def submit(self, *arguments: str, log: Path, more: Mapping[str, str] | None = None) -> str:
        """Submit the batch script for two nodes; returns the job's number."""
        options = [f"--nodes={len(NAMES)}", "--cpus-per-task=1", f"--output={log}"]
        script = str(ROOT / "cluster/slurm/train.sbatch")
        return self.command("sbatch", "--parsable", *options, script, *arguments, more=more)

    def state(self, job: str) -> tuple[str, int]:
        """A job's state and its exit code so far."""
        told = dict(word.partition("=")[::2] for word in self.command("scontrol", "show", "job", job).split())
        return told["JobState"], int(told["ExitCode"].partition(":")[0])

    def wait(self, job: str, timeout_s: float) -> tuple[str, int]:
        """Wait until nothing of a job runs any more."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job))[0] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job} is {state[0]}"
            time.sleep(0.5)
        return state

    def processes(self, name: str) -> dict[int, str]:
        """What jobs run on a node, and its title: all that is in its network, but for Slurm itself."""
        network = Path(f"/run/netns/{self._namespaces[name]}").stat().st_ino
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == network:
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if not title.startswith(("slurmd ", "slurmstepd: ")):
                        found[int(entry.name)] = title
        return found

    def on_disk(self, name: str) -> list[str]:
        """What is on a node's own disk."""
        slurmd = int((self.root / f"slurmd-{name}.pid").read_text())
        listed = self.command("nsenter", f"--target={slurmd}", "--mount", "ls", "-A", LOCAL)
        return listed.split()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.settings}

    def _make_networks(self) -> None:
        bridge = self._bridge
        self._ip("link", "add", bridge, "type", "bridge")
        self._undo.callback(self._ip, "link", "delete", bridge)
        self._ip("address", "add", f"{self._network}.254/24", "dev", bridge)
        self._ip("link", "set", bridge, "up")
        for position, namespace in enumerate(self._namespaces.values(), start=1):
            outside = f"{bridge}-{position}"
            self._ip("netns", "add", namespace)
            self._undo.callback(self._ip, "netns", "delete", namespace)
            self._ip("link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
            self._ip("link", "set", outside, "master", bridge, "up")
            self._ip("-n", namespace, "link", "set", "lo", "up")
            self._ip("-n", namespace, "address", "add", f"{self._network}.{position}/24", "dev", INTERFACE)
            self._ip("-n", namespace, "link", "set", INTERFACE, "up")

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], env=self._environment(), check=True)

    def _start_daemons(self) -> None:
        root, conf = self.root, self.settings["SLURM_CONF"]
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for name in ("state", *(f"spool-{name}" for name in NAMES)):
            (root / name).mkdir()
        files = [f"--{name}={root}/munge.{name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file")]
        self._start("munged", "--foreground", "--force", f"--socket={root}/munge.socket", *files)
        self._wait_for(root / "munge.socket")
        # The controller, too, only serves under the name that the configuration has for it.
        self._start("unshare", "--uts", "sh", "-c", f"hostname controller && exec slurmctld -D -f {conf}")
        for name, namespace in self._namespaces.items():
            own = ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--mount"]
            disk = f"mount -t tmpfs {name} {LOCAL}"
            self._start(*own, "sh", "-c", f"hostname {name} && {disk} && exec slurmd -D -N {name} -f {conf}")

    def _start(self, *command: str) -> None:
        with (self.root / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(
                command, cwd=self.root, env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(daemon)
        self._undo.callback(_end, daemon)

    def _wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + START_S
        while not path.exists():
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.05)

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START_S
        while self.command("sinfo", "--noheader", "--format=%T %D", check=False) != f"idle {len(NAMES)}":
            assert time.monotonic() < deadline, self._logs()
            assert all(daemon.poll() is None for daemon in self._daemons), self._logs()
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.root.glob("*.log")))


def _free_port() -> int:
    """The controller listens on all of the machine's addresses, where others may be."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    if lacking := missing():
        raise SystemExit(f"no Slurm can be started here; missing: {', '.join(lacking)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Slurm() as slurm:
        print(*(f"{name}={value}" for name, value in slurm.settings.items() if name != "PATH"), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
