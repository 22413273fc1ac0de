"""Connecting to Ray: a cluster of this process's own on loopback, or one that is there."""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from gmdist.config import ClusterConfig
from gmdist.errors import ConfigError

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Train's controller looks so often; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print of a worker comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Be connected to the cluster that the config names; one that was started for it ends afterwards."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    already = ray.is_initialized()
    if not already:
        _connect(config)
    try:
        check_resources(config)
        yield
    finally:
        if not already:
            ray.shutdown()


def _connect(config: ClusterConfig) -> None:
    if config.address == "local":
        # Ray's servers listen on every interface and run whatever they are sent: only who has the token may ask.
        # Without RAY_AUTH_MODE, Ray turns tokens on for a cluster of its own; this one is never written down.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        with _own_address():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, config.num_workers * config.cpus_per_worker),
                include_dashboard=True,  # without it Train leaks placement groups when its controller dies
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                logging_level="ERROR",
                log_to_driver=False,
            )
        return
    try:
        ray.init(address=config.address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"cluster.address: '{config.address}'; no Ray cluster answers there ({str(error).splitlines()[0]}); "
            "use 'local' to start one on this machine"
        ) from error


@contextmanager
def _own_address() -> Iterator[None]:
    """Let the processes of a cluster that starts now find it, and not another one on this machine.

    Ray's own helpers look for "the" cluster of a machine: with another one there, or the trace of one that was killed,
    every end of a training run waits 12 s for the wrong cluster's answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = {name: os.environ.get(name) for name in ("RAY_GCS_SERVER_PORT", "RAY_ADDRESS")}
    os.environ.update(RAY_GCS_SERVER_PORT=str(port), RAY_ADDRESS=f"127.0.0.1:{port}")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_resources(config: ClusterConfig) -> None:
    """ConfigError if the cluster is too small for the workers: Ray would wait for ever, silently."""
    total = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        needed, there = config.num_workers * each, int(total.get(resource, 0))
        if needed > there:
            raise ConfigError(
                f"cluster.num_workers: {config.num_workers} workers with {each} {resource} each need {needed}; "
                f"the cluster has {there}"
            )
