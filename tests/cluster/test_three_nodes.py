"""A run on three nodes of Ray: one is lost, one joins, and it stays the run that nothing happened to."""

import signal
import sys
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes
from tests.faults.test_elastic import (
    CONFIG,
    DEADLINE_S,
    Watched,
    check_same_run,
    newest_step,
    num_workers,
)

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

WINDOW = 15  # steps after each change


def test_three_nodes_lose_one_and_gain_one(digits: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "elastic.yaml"
    config.write_text(CONFIG.format(data=digits))
    train = [
        sys.executable,
        "-m",
        "gmdist.cli",
        "train",
        str(config),
        "data.batch_size=12",
        "train.checkpoint_every=10",
    ]
    with Nodes(num_cpus=0) as nodes:
        for _ in range(3):
            nodes.add(1)
        elastic = ["cluster.num_workers=[1,3]", f"cluster.address={nodes.address}", f"run.dir={run}"]
        watched = Watched([*train, *elastic], nodes.settings)

        def go_on() -> None:
            step = newest_step(run)
            watched.wait_for(lambda: newest_step(run) >= step + WINDOW, f"{WINDOW} steps after {step}")

        watched.wait_for(lambda: num_workers(run) == 3, "three workers")
        go_on()
        nodes.kill(-1)
        watched.wait_for_lines("going on with 2 workers instead of 3")
        go_on()
        nodes.add(1)
        watched.wait_for_lines("the cluster has room for 3 workers: saving a checkpoint, to go on with more")
        watched.wait_for_lines("going on with 3 workers instead of 2")
        go_on()
        watched.process.send_signal(signal.SIGTERM)
        assert watched.process.wait(DEADLINE_S) == 130, "".join(watched.lines)
    check_same_run(run, train, tmp_path / "whole")
