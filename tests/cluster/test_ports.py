"""What a cluster with a token answers somebody who has none, at each port that it listens at."""

import http.client
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
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

CALLS = (  # of each kind of server
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Push",
    "CoreWorkerService/GetCoreWorkerStats",
    "LogService/ListLogs",  # of a node's agent
    "RayletDriver/ClusterInfo",  # of Ray's clients
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and a node with a processor."""
    with Nodes(num_cpus=0, token=TOKEN) as cluster:
        cluster.add(1)
        yield cluster


def listening(nodes: Nodes) -> dict[str, str]:
    """The places, host:port, that processes of these nodes listen at, and whose they are."""
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
            for link in (entry / "fd").iterdir():
                with suppress(OSError):
                    sockets[str(link.readlink())] = title
    found = {}
    for name in ("tcp", "tcp6"):
        for line in (line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]):
            address, _, port = line[1].rpartition(":")
            title = sockets.get(f"socket:[{line[9]}]")
            if line[3] == LISTENS and title is not None:
                host = socket.inet_ntoa(bytes.fromhex(address)[-4:][::-1])  # of IPv6 what stands for an IPv4
                found[f"{'127.0.0.1' if host == '0.0.0.0' else host}:{int(port, 16)}"] = title
    return found


def over_http(place: str, path: str, token: str | None = None) -> str:
    """What a port says: a number, or that these are metrics; empty: it speaks another language."""
    request = urllib.request.Request(f"http://{place}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as found:
            return "metrics" if found.read(6) == b"# HELP" else str(found.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, http.client.HTTPException):
        return ""


def over_grpc(place: str, method: str) -> str:
    """What a port says of a call."""
    with grpc.insecure_channel(place) as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_only_metrics_are_open_over_http(nodes: Nodes) -> None:
    places = listening(nodes)
    dashboard = nodes.dashboard.removeprefix("http://")
    assert over_http(dashboard, "/api/jobs/", TOKEN) == "200"
    answers = {place: {path: over_http(place, path) for path in ASKED} for place in places}
    told = "\n".join(f"{place} {places[place][:60]}: {found}" for place, found in answers.items())
    assert all(said != "200" for found in answers.values() for said in found.values()), told
    assert answers[dashboard]["/api/jobs/"] == "401", told
    assert len([place for place, found in answers.items() if found["/metrics"] == "metrics"]) >= 2, told  # one a node


def test_no_server_takes_a_call_without_the_token(nodes: Nodes) -> None:
    """Of each kind there is one that knows the call, and refuses it."""
    code = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print('up', flush=True); sys.stdin.read()"
    driver = subprocess.Popen(
        [sys.executable, "-c", code, nodes.address],
        env=nodes.settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        said = {method: {place: over_grpc(place, method) for place in listening(nodes)} for method in CALLS}
    finally:
        driver.kill()
        driver.communicate()
    for method, answers in said.items():
        assert "OK" not in answers.values(), (method, answers)
        assert "UNAUTHENTICATED" in answers.values(), (method, answers)


def test_who_has_no_token_joins_no_cluster(nodes: Nodes) -> None:
    """With the token the same command is let in."""
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
