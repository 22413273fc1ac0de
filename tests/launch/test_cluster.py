"""Connecting to a cluster: what is not there is said at once."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import ray

from gmdist.config import ClusterConfig
from gmdist.errors import ConfigError, RunFailedError
from gmdist.launch.cluster import _connect, _probe, connected


def test_a_cluster_that_does_not_answer_is_said_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"cluster\.address: '127\.0\.0\.1:1'; no Ray cluster answers there .*'local'"
    ):
        _probe("127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        _probe(f"127.0.0.1:{server.getsockname()[1]}")
    _probe("auto")


@pytest.mark.parametrize(
    ("address", "message"), [("ray://127.0.0.1:1", "use host:port of the head"), ("127.0.0.1:1", "no Ray cluster")]
)
def test_the_address_that_the_environment_has_is_looked_at_too(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=rf"cluster\.address: '{address}'; {message}"):
        _connect(ClusterConfig("auto"))


def test_a_cluster_of_its_own_has_processors_for_the_least_workers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another's")
    for workers in (1, (2, 64), (6, 64)):
        _connect(ClusterConfig(num_workers=workers, cpus_per_worker=2))
    assert [options["num_cpus"] for options in started] == [4, 4, 12]
    assert {options["_node_ip_address"] for options in started} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_TOKEN"] not in ("another's", "")


def test_a_start_that_takes_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: Any) -> None:
        raise Exception(message)

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another's")
    message = "The current node timed out during startup. This could happen because"
    with pytest.raises(RunFailedError, match="did not start within 30 s: the machine is too busy"):
        _connect(ClusterConfig())
    message = "something else"
    with pytest.raises(Exception, match=message):
        _connect(ClusterConfig())


SLOW_TO_STOP = """
import os, signal, time
from gmdist.config import ClusterConfig
from gmdist.launch.cluster import connected
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append("asked"))
with connected(ClusterConfig()):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)
with connected(ClusterConfig()):  # another of this process, which has Ray's token by now
    print(got)
"""


def test_a_stop_may_take_longer_than_ray_waits_before_it_aborts_and_another_cluster_may_follow() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SLOW_TO_STOP], capture_output=True, text=True, timeout=90, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "['asked']\n"), ended.stderr
    assert "SIGTERM" not in ended.stderr


def test_an_autoscaler_is_asked_for_all_workers_until_the_end(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    config = ClusterConfig("auto", num_workers=(2, 64), gpus_per_worker=1, cpus_per_worker=4, autoscale=True)
    with connected(config, times=2):  # which this cluster has no room for
        with connected(config):  # a trial of the sweep that has asked
            pass
        assert asked == [[{"CPU": 4, "GPU": 1}] * 128]
    assert asked[1:] == [[]]
    with connected(ClusterConfig("auto")):
        pass
    assert len(asked) == 2
