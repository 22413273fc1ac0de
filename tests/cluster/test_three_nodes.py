"""A run on three nodes of Ray: one is lost, one joins, and it stays the run that nothing happened to."""

import sys
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes
from tests.faults.watched import CONFIG, Watched, check_same_run

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

WINDOW = 15  # steps after each change


def test_three_nodes_lose_one_and_gain_one(digits: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "elastic.yaml"
    config.write_text(CONFIG.format(data=digits))
    train = [sys.executable, "-m", "gmdist.cli", "train", str(config)]
    train += ["data.batch_size=12", "train.checkpoint_every=10"]
    with Nodes(num_cpus=0) as nodes:
        for _ in range(3):
            nodes.add(1)
        elastic = ["cluster.num_workers=[1,3]", f"cluster.address={nodes.address}", f"run.dir={run}"]
        watched = Watched([*train, *elastic], run, nodes.settings)
        watched.wait_for_workers(3)
        watched.go_on(WINDOW)
        nodes.kill(-1)
        watched.wait_for_lines("going on with 2 workers instead of 3")
        watched.go_on(WINDOW)
        nodes.add(1)
        watched.wait_for_lines("the cluster has room for 3 workers: saving a checkpoint, to go on with more")
        watched.wait_for_lines("going on with 3 workers instead of 2")
        watched.go_on(WINDOW)
        watched.stop()
    check_same_run(run, train, tmp_path / "whole")
