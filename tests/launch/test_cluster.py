"""Connecting to a cluster: what is not there is said at once."""

import socket

import pytest

from gmdist.errors import ConfigError
from gmdist.launch.cluster import _probe


def test_a_cluster_that_does_not_answer_is_said_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(
            ConfigError, match=rf"cluster\.address: '{address}'; no Ray cluster answers there .*'local'"
        ):
            _probe(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        _probe(f"127.0.0.1:{server.getsockname()[1]}")
    _probe("auto")
