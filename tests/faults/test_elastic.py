"""A run on a cluster whose nodes die, come and are taken away: the order of the undisturbed run, and its losses."""

import sys
from pathlib import Path

import pytest

from gmdist.train.checkpoint import find_newest
from tests.faults.nodes import Nodes
from tests.faults.watched import CONFIG, Watched, check_same_run, newest_step

pytestmark = pytest.mark.faults

WINDOW = 50  # steps after each change


def test_nodes_come_and_go(digits: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "elastic.yaml"
    config.write_text(CONFIG.format(data=digits))
    train = [sys.executable, "-m", "gmdist.cli", "train", str(config)]
    with Nodes(num_cpus=0) as nodes:
        nodes.add(1)
        nodes.add(1)
        elastic = ["cluster.num_workers=[1,2]", f"cluster.address={nodes.address}", f"run.dir={run}"]
        watched = Watched([*train, *elastic], run, nodes.settings)
        watched.wait_for_workers(2)
        watched.go_on(WINDOW)
        nodes.kill(-1)
        watched.wait_for_lines("going on with 1 workers instead of 2")
        watched.go_on(WINDOW)
        spot = nodes.add(1)
        watched.wait_for_lines("the cluster has room for 2 workers: saving a checkpoint, to go on with more")
        watched.wait_for_lines("going on with 2 workers instead of 1")
        watched.go_on(WINDOW)
        nodes.announce_end(spot, in_s=60)
        watched.wait_for_lines("a machine will be taken away: saving a checkpoint")
        told_at = newest_step(run)
        watched.wait_for(lambda: find_newest(str(run))[0].meta["step"] >= told_at - 5, "the checkpoint")
        nodes.kill(-1)
        watched.wait_for_lines("going on with 1 workers instead of 2", count=2)
        watched.go_on(WINDOW)
        watched.stop()
    check_same_run(run, train, tmp_path / "whole")
