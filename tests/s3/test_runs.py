"""A whole run in a bucket that refuses to store a checkpoint, and then stores it."""

import os
from pathlib import Path

import pytest

from gmdist import storage
from tests.faults.test_cli_runs import command, run_to_end
from tests.s3.proxy import Fault, FaultProxy
from tests.support import tree_bytes

pytestmark = pytest.mark.s3


def test_a_save_that_is_refused_ends_the_run_and_loses_nothing(
    proxy: FaultProxy, bucket: str, stored_digits: str, digits: Path, tmp_path: Path
) -> None:
    run = f"{bucket}/runs/refused"
    there = [f"data.train={stored_digits}/train", f"data.test={stored_digits}/test", f"run.dir={run}"]
    there += [f"data.s3.endpoint_url={proxy.url}", "data.s3.region=us-east-1", "data.s3.addressing_style=path"]
    arguments = command(digits, tmp_path / "whole", "train.num_steps=60")
    refusal = Fault("status", code=403, error="AccessDenied")
    proxy.decide_write = lambda path: refusal if "step-00000040/shard-00001" in path else None
    failed = run_to_end([*arguments, *there])
    assert failed.returncode == 1, failed.stdout + failed.stderr
    (line,) = failed.stderr.strip().splitlines()
    assert "cannot save a checkpoint" in line
    assert "checkpoints/step-00000040/shard-00001-of-00002.safetensors" in line
    assert "earlier checkpoints are as they were" in line
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in line
    assert storage.list_names(f"{run}/checkpoints") == ["step-00000020"]
    assert "Traceback" in storage.read(f"{run}/error.txt").decode()

    proxy.decide_write = lambda path: None
    ended = run_to_end([*arguments, *there])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert run_to_end(arguments).returncode == 0
    whole = tree_bytes(tmp_path / "whole/checkpoints/step-00000060")
    assert whole == {name: storage.read(f"{run}/checkpoints/step-00000060/{name}") for name in whole}
