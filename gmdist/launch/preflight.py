"""What is looked at before a run starts: room, and on every node versions, the data, the run's folder and the disk."""

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gmdist import runs, storage
from gmdist.config import Config
from gmdist.data.manifest import Manifest
from gmdist.errors import ConfigError, GmdistError
from gmdist.launch.cluster import check_resources
from gmdist.launch.lease import without_empty_folders
from gmdist.launch.probe import Expected, Finding, probe, versions

_HERE = "this machine"
_ANSWER_S = 12.0  # that a node may take: a process starts, and storage answers or does not


def examine_cluster(config: Config) -> list[Finding]:
    """Look at the cluster that this process is connected to; takes as long as its slowest node, and 12 s at most.

    The run's folder is written to; afterwards it holds what it held before.
    """
    runs.use_storage(config)
    findings, data = [_room(config)], []
    for key, folder in config.data.folders:
        try:
            data.append((key, folder, Manifest.load(storage.absolute(folder)).hash))
        except GmdistError as error:
            findings.append(Finding(_HERE, key, str(error), "without it nothing can be read"))
    mark = storage.join(config.run.dir, f"probe-{uuid.uuid4().hex[:8]}")
    expected = Expected(os.getcwd(), config.run.dir, mark, data, config.data.s3, versions())
    with without_empty_folders(config.run.dir):
        try:
            storage.write(mark, b"driver")
            return [*findings, *_ask_nodes(expected)]
        except GmdistError as error:
            return [*findings, Finding(_HERE, "run.dir", str(error), "use a folder that can be written to")]
        finally:
            with suppress(GmdistError):
                for name in storage.list_names(config.run.dir):
                    if storage.join(config.run.dir, name).startswith(mark):
                        storage.delete(storage.join(config.run.dir, name))


def check_cluster(config: Config) -> None:
    """ConfigError if the cluster is not as the run needs it, with the first reason."""
    wrong = [finding for finding in examine_cluster(config) if finding.remedy is not None]
    if wrong:
        others = f" (and {len(wrong) - 1} more: `gmdist doctor CONFIG` lists them)" if len(wrong) > 1 else ""
        raise ConfigError(f"{wrong[0]}{others}")


def table(findings: Sequence[Finding]) -> list[str]:
    """A line for each thing, in columns; a remedy below what it mends."""
    node, what = (max(len(getattr(finding, name)) for finding in findings) for name in ("node", "what"))
    lines = []
    for finding in findings:
        state = "ok     " if finding.remedy is None else "FAILED "
        lines.append(f"{state}  {finding.node:{node}}  {finding.what:{what}}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"         {finding.remedy}")
    return lines


def _room(config: Config) -> Finding:
    total = ray.cluster_resources()
    there = ", ".join(f"{int(total.get(name, 0))} {name}" for name in ("CPU", "GPU"))
    try:
        check_resources(config.cluster)
    except ConfigError as error:
        return Finding("cluster", "room", there, str(error))
    return Finding("cluster", "room", there)


def _ask_nodes(expected: Expected) -> list[Finding]:
    nodes = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
    if len(set(nodes.values())) < len(nodes):  # several on one machine
        nodes = {number: f"{name}/{number[:6]}" for number, name in nodes.items()}
    asked = {}
    for number, name in nodes.items():
        there = NodeAffinitySchedulingStrategy(number, soft=False)
        asked[name] = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(probe).remote(name, expected)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
    return [finding for name, answer in asked.items() for finding in _answer(name, answer)]


def _answer(name: str, answer: Any) -> list[Finding]:
    """What a node found, or why it did not say."""
    try:
        found: list[Finding] = ray.get(answer, timeout=0)
        return found
    except GetTimeoutError:
        ray.cancel(answer, force=True)
        return [Finding(name, "answer", f"none within {_ANSWER_S:.0f} s", "see whether its storage or network hangs")]
    except RayTaskError as error:
        reason = f"{type(error.cause).__name__}: {str(error.cause).partition(chr(10))[0]}"
        return [Finding(name, "answer", reason, "install gmdist and the packages of requirements.txt there")]
    except RayError as error:
        return [Finding(name, "answer", str(error).partition("\n")[0], "see the logs of Ray on that node")]
