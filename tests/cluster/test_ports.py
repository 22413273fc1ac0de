"""What a cluster with a token answers somebody who has none, at each port that it listens at."""

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes, environment

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

TOKEN = "0123456789abcdef" * 4
LISTENS = "0A"  # of /proc/net/tcp
ASKED = (
    "/metrics",
    "/api/jobs/",
    "/api/version",
    "/nodes?view=summary",
    "/api/v0/nodes",
    "/api/cluster_status",
    "/logs",
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and a node with a processor."""
    with Nodes(num_cpus=0, token=TOKEN) as cluster:
        cluster.add(1)
        yield cluster


def listening(nodes: Nodes) -> dict[int, str]:
    """The ports that processes of these nodes listen at, and whose they are."""
    mark = f"RAY_TMPDIR={nodes.settings['RAY_TMPDIR']}".encode()
    groups: dict[int, list[Path]] = {}
    own = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # it has ended, or is no process
            group = os.getpgid(int(entry.name))
            groups.setdefault(group, []).append(entry)
            if mark in (entry / "environ").read_bytes():  # which agents write their titles over
                own.add(group)
    sockets = {}
    for entry in (entry for group in own for entry in groups[group]):
        with suppress(OSError):
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            sockets |= {str(link.readlink()): title for link in (entry / "fd").iterdir()}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        int(line[1].rpartition(":")[2], 16): sockets[f"socket:[{line[9]}]"]
        for line in lines
        if line[3] == LISTENS and f"socket:[{line[9]}]" in sockets
    }


def answer(port: int, path: str, token: str | None = None) -> str:
    """What a port says over HTTP: a number, or that these are metrics; empty: it speaks another language."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as found:
            return "metrics" if found.read(6) == b"# HELP" else str(found.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, http.client.HTTPException):
        return ""


def test_only_metrics_are_open(nodes: Nodes) -> None:
    ports = listening(nodes)
    dashboard = int(nodes.dashboard.rpartition(":")[2])
    assert answer(dashboard, "/api/jobs/", TOKEN) == "200"
    answers = {port: {path: answer(port, path) for path in ASKED} for port in ports}
    told = "\n".join(f"{port} {ports[port][:60]}: {found}" for port, found in answers.items())
    assert all(said != "200" for found in answers.values() for said in found.values()), told
    assert answers[dashboard]["/api/jobs/"] == "401", told
    assert len([port for port, found in answers.items() if found["/metrics"] == "metrics"]) >= 2, told  # one a node


def test_who_has_no_token_joins_no_cluster(nodes: Nodes) -> None:
    """At the port of the head, and as `ray://`; with the token the same command is let in."""
    asked = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print(len(ray.nodes()))"
    for mode, expected in (("disabled", None), ("token", "2")):
        settings = (nodes.settings if mode == "token" else environment()) | {"RAY_AUTH_MODE": mode}
        settings |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_gcs_server_request_timeout_seconds": "5"}
        ended = subprocess.run(
            [sys.executable, "-c", asked, nodes.address], env=settings, capture_output=True, text=True, timeout=90
        )
        if expected is None:
            assert ended.returncode != 0
            assert "uthenticat" in ended.stderr, ended.stderr[-2000:]
        else:
            assert ended.stdout.strip() == expected, ended.stderr[-2000:]
