"""Jobs of cluster/slurm/train.sbatch on a Slurm of two nodes: trained, stopped, gone on, refused, cancelled."""

import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmdist.train.metrics import read_lines
from tests.cluster.slurm.nodes import NAMES, Slurm, missing
from tests.faults.nodes import environment

pytestmark = pytest.mark.slurm

SETTINGS = ["configs/digits/autoencoder_kl.yaml", "family.autoencoder.channels=8", "data.batch_size=16"]
SETTINGS += ["train.sample_every=null", "train.evaluate_every=null", "train.checkpoint_every=20", "train.log_every=10"]
DEADLINE_S = 240


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """The cluster. `make test-slurm` installs it."""
    if lacking := missing():
        pytest.skip(f"needs a Slurm; missing: {', '.join(lacking)}; see `make test-slurm`")
    with Slurm(cpus_per_node=2) as cluster:
        yield cluster


class Jobs:
    """Submits jobs that train one run on the digits; knows where they leave what."""

    def __init__(self, slurm: Slurm, digits: Path, folder: Path) -> None:
        self.slurm, self.run, self.shared = slurm, folder / "run", folder / "shared"
        self.shared.mkdir()
        self._folder = folder
        self._settings = [*SETTINGS, f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={self.run}"]
        self._environment = {**environment(), "GMDIST_SHARED": str(self.shared), "OMP_NUM_THREADS": "1"}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{slurm.settings['PATH']}"

    def submit(self, *more: str, **variables: str) -> str:
        """Submit a job, with settings and variables; returns its number."""
        log = self._folder / "%j.log"
        arguments = ["jobs/train.py", *self._settings, *more]
        return self.slurm.submit(*arguments, log=log, more=self._environment | variables)

    def log(self, job: str) -> str:
        """What a job has said so far."""
        return (self._folder / f"{job}.log").read_text()

    def steps(self) -> list[int]:
        """The steps that the run has told of."""
        return [line["step"] for line in read_lines(str(self.run))]

    def wait_for_step(self, job: str, after: int) -> None:
        """Wait until the run has told of a step after this one."""
        deadline = time.monotonic() + DEADLINE_S
        while max(self.steps(), default=0) <= after:
            assert self.slurm.state(job)[0] in ("PENDING", "CONFIGURING", "RUNNING"), self.log(job)
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        complete = self.run.glob("checkpoints/*/meta.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in complete), default=0)

    def assert_nothing_is_left(self) -> None:
        """No process, no token, nothing of Ray's on the nodes' own disks."""
        assert [self.slurm.processes(name) for name in NAMES] == [{}, {}]
        assert list(self.shared.iterdir()) == []
        assert [self.slurm.on_disk(name) for name in NAMES] == [[], []]


@pytest.fixture
def jobs(slurm: Slurm, digits: Path, tmp_path: Path) -> Jobs:
    """Jobs of a new run."""
    return Jobs(slurm, digits, tmp_path)


def test_a_run_over_two_nodes_is_stopped_and_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    slurm = jobs.slurm
    # Both at once on the same nodes: each has its own ports.
    first, wrong = jobs.submit("train.num_steps=200"), jobs.submit("trainn.num_steps=200")
    jobs.wait_for_step(first, after=0)
    for name in NAMES:
        titles = list(slurm.processes(name).values())
        assert sum(title.startswith("ray::RayTrainWorker") for title in titles) == 1, titles
    token = jobs.shared / f".gmdist-{first}/token"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)] == [0o600, 0o700]
    secret = token.read_text()
    assert len(secret) == 64

    slurm.command("scancel", "--batch", "--signal=TERM", first)
    assert slurm.wait(first, DEADLINE_S) == ("FAILED", 130), jobs.log(first)
    assert "stopped, the same command goes on from here" in jobs.log(first)
    assert slurm.wait(wrong, DEADLINE_S) == ("FAILED", 2), jobs.log(wrong)
    assert "gmdist: trainn: no such key; did you mean 'train'?" in jobs.log(wrong)
    stopped = jobs.saved()
    assert 0 < stopped < 200
    jobs.assert_nothing_is_left()

    second = jobs.submit("train.num_steps=200")
    assert slurm.wait(second, DEADLINE_S) == ("COMPLETED", 0), jobs.log(second)
    assert "step 200, 3200 images, order digest" in jobs.log(second)
    assert jobs.steps() == list(range(10, 201, 10))  # none of them twice
    assert len(list((jobs.run / "checkpoints/step-00000200").glob("shard-*-of-00002.safetensors"))) == 2
    jobs.assert_nothing_is_left()

    # Neither in what jobs say and leave, nor in what Slurm keeps of them.
    written = [path for folder in (tmp_path, slurm.root) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == f"{first}.log" for path in written)
    assert [path for path in written if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("how", [["--signal=TERM"], []])
def test_a_stop_of_all_steps_at_once_lets_the_workers_save(jobs: Jobs, how: list[str]) -> None:
    # As before a preemption, and as at the end of a time limit.
    job = jobs.submit("train.num_steps=100000", "train.checkpoint_every=100000")
    jobs.wait_for_step(job, after=0)
    assert jobs.saved() == 0
    jobs.slurm.command("scancel", *how, job)
    assert jobs.slurm.wait(job, DEADLINE_S) == ("FAILED" if how else "CANCELLED", 130), jobs.log(job)
    assert "stopped, the same command goes on from here" in jobs.log(job)
    assert jobs.saved() > 0
    jobs.assert_nothing_is_left()


def test_a_stop_while_ray_starts_ends_the_job(jobs: Jobs) -> None:
    job = jobs.submit("train.num_steps=20")
    deadline = time.monotonic() + DEADLINE_S
    while not all(jobs.slurm.on_disk(name) for name in NAMES):
        assert time.monotonic() < deadline, jobs.log(job)
    jobs.slurm.command("scancel", "--batch", "--signal=TERM", job)
    assert jobs.slurm.wait(job, DEADLINE_S) == ("FAILED", 130), jobs.log(job)
    assert not jobs.run.exists()
    jobs.assert_nothing_is_left()


def test_nodes_without_ray_at_the_deadline_end_the_job(jobs: Jobs) -> None:
    job = jobs.submit("train.num_steps=20", GMDIST_START_S="1")
    assert jobs.slurm.wait(job, DEADLINE_S) == ("FAILED", 1)
    assert re.search("^gmdist: Ray is on [01] of 2 nodes after 1 s$", jobs.log(job), re.MULTILINE)
    assert jobs.log(job).endswith("gmdist: Ray did not start on all of n1 n2\n")
    jobs.assert_nothing_is_left()
