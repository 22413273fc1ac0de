"""Jobs on a cluster of three nodes with a token: submitted and followed, refused without it, and nothing given away."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmdist.train.metrics import read_lines
from tests.faults.nodes import Nodes
from tests.faults.test_cli_runs import CONFIG, DEADLINE_S, ROOT, SETTINGS

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

TOKEN = "planted-token-0123456789abcdef0123456789abcdef"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "HF_TOKEN": "planted-hub-token",
    "MY_PASSWORD": "planted-pass",
}
SHORT = [*SETTINGS, "train.num_steps=20"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, and two nodes with a processor each."""
    with Nodes(num_cpus=0, token=TOKEN) as cluster:
        cluster.add(1)
        cluster.add(1)
        yield cluster


def submitted(
    nodes: Nodes, *arguments: str, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`gmdist submit` in a shell that holds secrets."""
    return subprocess.run(
        [sys.executable, "-m", "gmdist.cli", "submit", *arguments, "--address", nodes.dashboard],
        cwd=ROOT,
        env=(settings or nodes.settings) | SECRETS,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def data_of(digits: Path, run: Path) -> list[str]:
    return [f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={run}"]


def test_a_job_trains_over_nodes_and_gives_no_secret_away(nodes: Nodes, digits: Path, tmp_path: Path) -> None:
    ended = submitted(nodes, CONFIG, *SHORT, "cluster.num_workers=2", *data_of(digits, tmp_path / "run"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "order digest" in ended.stdout
    assert f"for {tmp_path}/run" in ended.stderr
    last = read_lines(str(tmp_path / "run"))[-1]
    assert last["step"] == 20
    assert round(last["images_per_s"] / last["images_per_s_worker"]) == 2
    told = json.dumps(nodes.ask("/api/jobs/")) + ended.stdout + ended.stderr
    told += "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file())
    logs = Path(nodes.settings["RAY_TMPDIR"]).rglob("*")
    told += "".join(path.read_text(errors="replace") for path in logs if path.suffix in (".log", ".out", ".err"))
    assert not [secret for secret in (*SECRETS.values(), TOKEN) if secret in told]


def test_without_the_token_a_job_is_refused(nodes: Nodes, digits: Path, tmp_path: Path) -> None:
    stranger = {key: value for key, value in nodes.settings.items() if not key.startswith("RAY_AUTH")}
    refused = submitted(
        nodes, CONFIG, *data_of(digits, tmp_path / "run"), settings=stranger | {"RAY_AUTH_MODE": "disabled"}
    )
    assert refused.returncode == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_the_exit_code_of_the_job_is_the_commands(nodes: Nodes, digits: Path, tmp_path: Path) -> None:
    failed = submitted(nodes, CONFIG, *SHORT, *data_of(tmp_path / "nowhere", tmp_path / "run"))
    assert failed.returncode == 1
    assert "no such data set" in failed.stdout
    wrong = submitted(nodes, CONFIG, *SHORT, *data_of(digits, tmp_path / "run"), "cluster.num_workers=4")
    assert wrong.returncode == 2
    assert "cluster.cpus_per_worker: 4 workers" in wrong.stdout


def test_a_sweep_is_a_job_too(nodes: Nodes, digits: Path, tmp_path: Path) -> None:
    config = ROOT / "configs/digits/autoencoder_kl.yaml"
    path = ROOT / "configs" / f".test-{os.getpid()}.yaml"
    space = "{optim.autoencoder.lr: {choice: [1.0e-3, 2.0e-3]}}"
    try:
        path.write_text(
            f"base: {config}\nsweep: {{metric: test/l1, space: {space}, search: grid, concurrency: 2}}\n"
            "cluster: {num_workers: 1}\n"
        )
        short = [*SHORT, "train.evaluate_every=20"]
        ended = submitted(nodes, str(path.relative_to(ROOT)), *short, *data_of(digits, tmp_path / "sweep"))
    finally:
        path.unlink(missing_ok=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["best"] in (0, 1)
    assert (tmp_path / "sweep/best.yaml").exists()
