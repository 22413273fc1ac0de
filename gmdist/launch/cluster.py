"""Connecting to Ray: a cluster of this process's own on loopback, or one that is there."""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray._private import services

from gmdist.config import ClusterConfig
from gmdist.errors import ConfigError, RunFailedError

_TOKEN = secrets.token_hex(32)  # of all clusters that this process starts: Ray reads a process's token once
START_TIMEOUT_S = 30  # that Ray Train waits for the room that workers need
_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Train's controller looks so often; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print of a worker comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Each controller would set its process's loggers up anew, and wait for ever where another one logs just then.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Train's controller does it, and says so for its own process only
}


_has_asked = False  # this process, the autoscaler for machines


@contextmanager
def connected(config: ClusterConfig, *, may_be_small: bool = False, times: int = 1) -> Iterator[None]:
    """Be connected to the cluster that the config names; one that was started for it ends afterwards.

    With cluster.autoscale, machines for the workers, so many times, are asked for as long: for a sweep and not for
    each of its trials, as a request takes the place of the one before.

    Raises:
        ConfigError: no cluster answers; or, unless it may be, it is too small for the workers.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    already = ray.is_initialized()
    try:
        if not already:
            with _own_handler():
                _connect(config)
        if not may_be_small:
            check_resources(config)
        with _requested(config, times):
            yield
    except SystemExit as error:  # Ray's own answer to a SIGTERM, where its caller has none
        raise KeyboardInterrupt from error
    finally:
        if not already:
            ray.shutdown()


def _connect(config: ClusterConfig) -> None:
    # Ray has a paragraph for stdout about every process that died, whatever it is told of logs; the command says it.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if config.address == "local":
        # Ray's servers listen on every interface and run whatever they are sent: only who has the token may ask.
        # Without RAY_AUTH_MODE, Ray turns tokens on for a cluster of its own; this one is never written down.
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
        with _own_address(), _groups_of_their_own(), _no_api_server():
            _start(max(os.cpu_count() or 1, config.worker_range[0] * config.cpus_per_worker))
        return
    address = config.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address  # as Ray itself does
        replace(config, address=address).validate()
    _probe(address)
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise _unreachable(address, str(error).splitlines()[0]) from error


def _start(num_cpus: int) -> None:
    """A cluster of this machine alone, for this command."""
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level="ERROR",
            log_to_driver=False,
        )
    except Exception as error:  # it has no kind of its own for this
        if "timed out during startup" not in str(error):
            raise
        raise RunFailedError(
            "Ray's servers did not start within 30 s: the machine is too busy; the same command tries again"
        ) from error


def _probe(address: str) -> None:
    """ConfigError if nothing listens at host:port: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"cluster.address: '{address}'; no Ray cluster answers there ({reason}); "
        "use 'local' to start one on this machine"
    )


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Start Ray's processes in process groups of their own while this holds.

    A terminal's Ctrl-C, and a batch system's SIGTERM, go to the whole group of a command: in that group Ray would die
    before its workers could save. Ray has no setting for it; its processes still end with this one, by the kernel.
    """
    original = services.ConsolePopen

    class InOwnGroup(original):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, process_group=0, **options)

    services.ConsolePopen = InOwnGroup
    try:
        yield
    finally:
        services.ConsolePopen = original


@contextmanager
def _no_api_server() -> Iterator[None]:
    """Start no API server while this holds: without the dashboard it only reports usage, and takes 1.4 s to start."""
    original = services.start_api_server
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = original


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM, if there is one, while this holds.

    Ray would set its own, which leaves Ray's start in the middle, and processes of it behind. That of its C++ side is
    called before Python's: it prints a stack, and aborts the process 3 s later, in the middle of a checkpoint.
    """
    original, own = ray._private.utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    is_set = own not in (signal.SIG_DFL, None)
    if is_set:
        ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = original
        if is_set and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


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


@contextmanager
def _requested(config: ClusterConfig, times: int) -> Iterator[None]:
    """Have the autoscaler keep machines for all workers while this holds: no other command may ask it meanwhile."""
    global _has_asked
    if not config.autoscale or _has_asked:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    request_resources(bundles=[worker] * (config.worker_range[1] * times))
    _has_asked = True
    try:
        yield
    finally:
        _has_asked = False
        request_resources(bundles=[])


def check_resources(config: ClusterConfig) -> None:
    """ConfigError if the cluster is too small for the workers, and does not grow: Ray would wait for ever, silently."""
    if config.autoscale:
        return
    least, _ = config.worker_range
    total = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        needed, there = least * each, int(total.get(resource, 0))
        if needed > there:
            where = "this machine" if config.address == "local" else "the cluster"
            keys = f"cluster.num_workers or cluster.{resource.lower()}s_per_worker"
            raise ConfigError(f"{keys}: {least} workers with {each} {resource} each need {needed}; {where} has {there}")


def room(config: ClusterConfig) -> int:
    """Workers that the machines that stay have room for, if nothing else runs there."""
    return sum(_fitting(config, node["Resources"]) for node in _staying())


def free_room(config: ClusterConfig) -> int:
    """Workers that there is room for beside what runs now."""
    free = ray._private.state.available_resources_per_node()
    return sum(_fitting(config, free.get(node["NodeID"], {})) for node in _staying())


def _staying() -> list[dict[str, Any]]:
    lost = leaving()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in lost]


def _fitting(config: ClusterConfig, resources: dict[str, float]) -> int:
    """Workers that fit into a node's resources."""
    fitting = int(resources.get("CPU", 0)) // config.cpus_per_worker
    if config.gpus_per_worker:
        fitting = min(fitting, int(resources.get("GPU", 0)) // config.gpus_per_worker)
    return fitting


def leaving() -> set[str]:
    """The nodes that will be taken away: of spot machines, and of those that are drained."""
    return set(ray._private.state.state.get_draining_nodes())
