"""What `gmdist submit` refuses before a job starts, and what it makes of locations that are relative to this folder."""

import os
import socket
from pathlib import Path

import pytest
from ray.dashboard.modules.job.common import JobInfo
from ray.job_submission import JobStatus

from gmdist.config import compose, load
from gmdist.errors import ConfigError, RunFailedError
from gmdist.launch.submit import _absolute, _follow, _too_large, submit

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/digits/latent_diffusion.yaml"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refused(path: str, overrides: list[str], address: str = "http://127.0.0.1:1") -> str:
    with pytest.raises(ConfigError) as error:
        submit(path, overrides, address, print, print)
    return str(error.value)


def test_no_server_is_said_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        message = refused(CONFIG, [], f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert "no job server of Ray answers there" in message


def test_an_address_with_a_password_is_not_repeated() -> None:
    message = refused(CONFIG, [], "http://ada:sesame@head:8265")
    assert "--address: must not hold credentials; " in message
    assert "sesame" not in message


def test_a_config_that_cannot_be_is_refused_here() -> None:
    assert "optim.denoiser.lrate: no such key" in refused(CONFIG, ["optim.denoiser.lrate=1"])
    assert "sweep.mode: 'most'" in refused("configs/sweeps/digits_vae_betas.yaml", ["sweep.mode=most"])


def test_a_config_or_script_that_is_not_uploaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "other.yaml"
    outside.write_text(f"base: {ROOT}/{CONFIG}\n")
    assert "is outside of" in refused(str(outside), [])
    monkeypatch.chdir(tmp_path)
    assert "jobs/train.py: is not in" in refused(str(ROOT / CONFIG), [])
    for folder in ("jobs", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "jobs/train.py").touch()
    (tmp_path / ".rayignore").write_text("/runs/\n")
    (tmp_path / "runs/best.yaml").write_text(f"base: {ROOT}/{CONFIG}\n")
    assert "runs/best.yaml: is not uploaded" in refused("runs/best.yaml", [])
    assert f"{ROOT}/{CONFIG}: is not uploaded" in refused(str(outside), [])


def test_relative_locations_mean_what_they_mean_here() -> None:
    overrides = ["run.dir=s3://bucket/run", "data.test=null", "data.train=null", "data.mix={a: {train: here/a}}"]
    found = _absolute(compose(CONFIG, overrides), load(CONFIG, overrides))
    assert f"family.first_stage={os.getcwd()}/runs/digits/autoencoder_kl" in found
    assert not any(one.startswith(("run.", "data.test")) for one in found)
    meant = load(CONFIG, [*overrides, *found])
    assert meant.to_yaml() == load(CONFIG, overrides).to_yaml()
    assert f"data.mix.a.train={os.getcwd()}/here/a" in found
    overrides = ["data.test=null", "data.train=null", "data.mix={a.b: {train: here/a}, c: {train: /c, weight: 2}}"]
    meant = load(CONFIG, [*overrides, *_absolute(compose(CONFIG, overrides), load(CONFIG, overrides))])
    assert meant.to_yaml() == load(CONFIG, overrides).to_yaml()
    overrides = ["run.dir=../elsewhere/run", "data.train=~/train", f"data.test={os.getcwd()}/test"]
    found = _absolute(compose(CONFIG, overrides), load(CONFIG, overrides))
    assert f"run.dir={os.path.dirname(os.getcwd())}/elsewhere/run" in found
    assert f"data.train={os.path.expanduser('~')}/train" in found
    assert not any(one.startswith("data.test") for one in found)


def test_relative_locations_to_search_over_are_refused() -> None:
    space = "family.first_stage: {choice: [runs/a, /runs/b]}, optim.denoiser.lr: {log_uniform: [1.0e-4, 1.0e-3]}"
    message = refused(CONFIG, [f"sweep={{metric: test/loss, num_trials: 2, space: {{{space}}}}}"])
    assert (
        message == f"sweep.space.family.first_stage: 'runs/a'; must be absolute in a job, as '{os.getcwd()}/runs/a' is"
    )


def test_a_server_that_goes_away_is_no_end_of_the_job() -> None:
    class Client:
        async def tail_job_logs(self, job: str):
            yield f"{job} begins\n"
            raise RuntimeError("WebSocket connection closed unexpectedly")

    seen: list[str] = []
    with pytest.raises(RunFailedError, match=r"the job goes on .* `ray job logs --follow --address http://HEAD job-1`"):
        _follow(Client(), "job-1", "http://HEAD", seen.append)
    assert seen == ["job-1 begins\n"]


@pytest.mark.parametrize(
    ("message", "said"), [("no such image\nTraceback", "no such image"), ("", "Ray does not say why")]
)
def test_a_job_that_could_not_be_run_says_why(message: str, said: str) -> None:
    class Client:
        async def tail_job_logs(self, job: str):
            yield ""

        def get_job_info(self, job: str) -> JobInfo:
            return JobInfo(status=JobStatus.FAILED, entrypoint="", message=message)

    with pytest.raises(RunFailedError, match=f"^job-1: FAILED: {said}$"):
        _follow(Client(), "job-1", "http://HEAD", print)


def test_too_much_to_upload_names_the_largest_files(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text("runs/\n")
    for name, size in {"large.bin": 3 << 20, "small.bin": 1, "runs/huge.bin": 9 << 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    message = _too_large(tmp_path)
    assert "large.bin (3 MiB), " in message
    assert "huge" not in message
    assert ": 3 MiB to upload" in message
