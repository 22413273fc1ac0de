"""A machine that its cloud will take away: `cluster/drain.sh` sees it there, and Ray and its runs are told."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
DEADLINE_S = 60


class Cloud(BaseHTTPRequestHandler):
    """The addresses at which AWS and Google tell a machine of its end; each wants its own header."""

    takes_back = threading.Event()
    asked: list[str]

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if wanted else 400, "session")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        ending = self.takes_back.is_set()
        if self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers["X-aws-ec2-metadata-token"] == "session"
            self._answer((200 if ending else 404) if allowed else 401, '{"action": "terminate"}')
        elif self.path == "/computeMetadata/v1/instance/preempted":
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self._answer(200 if allowed else 403, "TRUE" if ending else "FALSE")
        else:
            self._answer(400, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metadata() -> Iterator[str]:
    Cloud.takes_back.clear()
    Cloud.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def processes_of(folder: Path, *command_lines: bytes) -> str:
    """A /proc in which only these run."""
    for number, line in enumerate(command_lines, start=1):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "cmdline").write_bytes(line)
    return str(folder)


def raylet_of(node: str) -> bytes:
    (found,) = [
        line
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if (line := _read(entry)).partition(b"\0")[0].endswith(b"/raylet/raylet") and node.encode() in line
    ]
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def ray_command(tmp_path: Path) -> Path:
    """A `ray` that writes down what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ray").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    (folder / "ray").chmod(0o755)
    return folder


RAYLET = b"/x/ray/core/src/ray/raylet/raylet\0--raylet_socket_name=/s\0--node_id=ab12\0--gcs-address=10.0.0.1:6379\0"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(("cloud", "left_s"), [("aws", "110"), ("gcp", "25")])
def test_it_waits_for_the_clouds_word(cloud: str, left_s: str, metadata: str, ray_command: Path, tmp_path: Path):
    proc = processes_of(tmp_path / "proc", b"bash\0", RAYLET)
    settings = {"PROC": proc, "METADATA": metadata, "PATH": f"{ray_command}:/usr/bin:/bin"}
    watcher = subprocess.Popen(["bash", str(ROOT / "cluster/drain.sh"), cloud], env=settings)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not Cloud.asked:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert watcher.poll() is None
        assert not (tmp_path / "called").exists()
        Cloud.takes_back.set()
        assert watcher.wait(DEADLINE_S) == 0
    finally:
        watcher.kill()
    called = (tmp_path / "called").read_text()
    assert called.startswith("drain-node --address 10.0.0.1:6379 --node-id ab12 --reason DRAIN_NODE_REASON_PREEMPTION")
    assert called.endswith(f"--deadline-remaining-seconds {left_s}\n")


def test_a_pod_stays_while_a_worker_saves(ray_command: Path, tmp_path: Path):
    """Kubernetes ends a pod when this has ended."""
    proc = processes_of(tmp_path / "proc", RAYLET, b"ray::RayTrainWorker.execute\0")
    settings = {"PROC": proc, "PATH": f"{ray_command}:/usr/bin:/bin"}
    hook = subprocess.Popen(["bash", str(ROOT / "cluster/drain.sh"), "now", "60"], env=settings)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(3)
        assert (tmp_path / "called").exists()
        shutil.rmtree(Path(proc, "2"))
        assert hook.wait(DEADLINE_S) == 0
    finally:
        hook.kill()


def test_without_ray_it_says_so(ray_command: Path, tmp_path: Path):
    proc = processes_of(tmp_path / "proc", b"bash\0")
    settings = {"PROC": proc, "PATH": f"{ray_command}:/usr/bin:/bin"}
    command = ["bash", str(ROOT / "cluster/drain.sh")]
    ended = subprocess.run([*command, "now"], env=settings, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "drain.sh: no raylet runs here\n")
    assert subprocess.run([*command, "azure"], env=settings, capture_output=True).returncode == 2


@pytest.mark.ray
@pytest.mark.cluster
def test_ray_is_told(tmp_path: Path):
    """A node of a cluster with a token is drained, and no other one."""
    with Nodes(num_cpus=0, token=TOKEN) as nodes:
        node = nodes.add(1)
        settings = nodes.settings | {"PROC": processes_of(tmp_path / "proc", raylet_of(node))}
        subprocess.run(["bash", str(ROOT / "cluster/drain.sh"), "now"], env=settings, check=True, timeout=DEADLINE_S)
        ask = (
            "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR');"
            "gone = [node['NodeID'] for node in ray.nodes() if not node['Alive']];"  # at once, as nothing ran there
            "print(sorted({*gone, *ray._private.state.state.get_draining_nodes()}))"
        )
        told = subprocess.run(
            [sys.executable, "-c", ask, nodes.address], env=nodes.settings, capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == str([node])
