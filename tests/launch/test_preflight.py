"""What is looked at before a run starts, on each node, and what is said of what is wrong."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gmdist.cli import main
from gmdist.config import load
from gmdist.data.manifest import Manifest
from gmdist.errors import ConfigError
from gmdist.launch import preflight, probe
from gmdist.launch.preflight import check_cluster, examine_cluster, table
from gmdist.launch.probe import Expected, Finding, versions
from gmdist.s3 import S3Config

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/vae.yaml")


@pytest.fixture
def expected(noise: str, tmp_path: Path) -> Expected:
    """What a node finds that has all."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "mark").touch()
    data = [("data.train", noise, Manifest.load(noise).hash)]
    return Expected(str(tmp_path), str(run), str(run / "mark"), data, S3Config(), versions())


def wrong(expected: Expected) -> list[Finding]:
    return [finding for finding in probe.probe("node", expected) if finding.remedy is not None]


def test_a_node_that_has_all_finds_nothing_wrong_and_leaves_nothing(expected: Expected) -> None:
    assert wrong(expected) == []
    assert [path.name for path in Path(expected.run_dir).iterdir()] == ["mark"]


def test_other_versions_are_named(expected: Expected) -> None:
    (found,) = wrong(replace(expected, versions=expected.versions | {"numpy": "1.0"}))
    assert found.what == "versions"
    assert found.remedy == "install numpy 1.0 there, as where the command runs"


def test_data_that_is_missing_or_another_is_named(expected: Expected, digits: Path) -> None:
    (found,) = wrong(replace(expected, data=[("data.train", f"{expected.folder}/none", "x")]))
    assert "no such data set" in found.found
    (found,) = wrong(replace(expected, data=[("data.test", f"{digits}/test", expected.data[0][2])]))
    assert found.what == "data.test"
    assert "another data set" in found.found


def test_a_folder_that_is_not_the_drivers_is_named(expected: Expected) -> None:
    Path(expected.mark).unlink()
    (found,) = wrong(expected)
    assert "does not hold what the command wrote" in found.found
    assert "s3://" in str(found)


def test_a_full_disk_is_named(expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LEAST_FREE_BYTES", 1 << 60)
    assert {found.what for found in wrong(expected)} == {"disk"}


@pytest.mark.ray
def test_a_cluster_is_examined_within_seconds(
    ray_cluster: Any, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={tmp_path}/new/run"]
    began_s = time.monotonic()
    findings = examine_cluster(load(CONFIG, settings))
    assert time.monotonic() - began_s < 60
    assert {finding.what for finding in findings} == {
        *("room", "versions", "data.train", "data.test", "run.dir", "disk")
    }
    assert all(finding.remedy is None for finding in findings)
    assert not list(tmp_path.iterdir())
    check_cluster(load(CONFIG, settings))

    wrong = [*settings, "cluster.num_workers=4", f"data.test={tmp_path}/none"]
    with pytest.raises(ConfigError, match=r"cluster: room: .*4 workers with 1 CPU each need 4.*1 more"):
        check_cluster(load(CONFIG, wrong))
    assert main(["doctor", CONFIG, *wrong]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED   cluster") and "2 CPU" in line for line in lines)
    assert any("no such data set" in line for line in lines)


@pytest.mark.ray
def test_a_node_that_does_not_answer_is_named(
    ray_cluster: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_ANSWER_S", 0.0)
    config = load(CONFIG, [f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={tmp_path}/run"])
    (found,) = [finding for finding in examine_cluster(config) if finding.remedy is not None]
    assert found.found == "none within 0 s"


def test_a_table_has_each_remedy_below_what_it_mends() -> None:
    lines = table([Finding("a", "disk", "full", "make room"), Finding("node", "run.dir", "written")])
    assert lines == ["FAILED   a     disk     full", "         make room", "ok       node  run.dir  written"]
