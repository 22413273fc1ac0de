"""What `ray job submit --working-dir .` sends to a cluster: the code, and neither runs, data nor secrets."""

import io
import shutil
import subprocess
import uuid
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECRET = uuid.uuid4().hex
PLANTED = [
    ".aws/credentials",
    ".bash_history",
    ".cache/huggingface/token",
    ".config/gcloud/application_default_credentials.json",
    ".docker/config.json",
    ".dockercfg",
    ".env",
    ".env.local",
    ".envrc",
    ".env~",
    ".git-credentials",
    ".git/config",
    ".hf_token",
    ".kube/config",
    ".mypy_cache/z",
    ".netrc",
    ".netrc.bak",
    ".passwd-s3fs",
    ".ray/auth_token",
    ".secrets",
    ".ssh/config",
    ".vault-token",
    ".venv/bin/z",
    "_netrc",
    "auth_token",
    "aws/credentials",
    "cert.PEM",
    "cluster/id_rsa",
    "configs/.env",
    "configs/images/credentials.json",
    "credentials",
    "credentials.json",
    "data/photos/manifest.json",
    "deploy_key",
    "gcp-key.json",
    "gmdist-service-account.json",
    "gmdist/__pycache__/cli.pyc",
    "hf_token",
    "id_ed25519",
    "id_rsa",
    "key.json",
    "kubeconfig.yaml",
    "my.token",
    "password.txt",
    "prod.env",
    "ray-autoscaler_us-west-2.pem",
    "ray_token",
    "rclone.conf",
    "runs/x/config.yaml",
    "secrets.yaml",
    "secrets/hf",
    "server.KEY",
    "server.key",
    "sub/prod.env",
    "terraform.tfstate",
    "terraform.tfvars",
    "token",
    "token.txt",
    "trust.jks",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that git keeps, with what people leave beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines()
    if listed.returncode or not names:
        pytest.skip("not a checkout of git")
    for name in names:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for name in PLANTED:
        assert not (tmp_path / name).exists()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SECRET)
    return tmp_path


@pytest.fixture(params=["with Ray's own excludes", "by .rayignore alone"])
def sent(checkout: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> zipfile.ZipFile:
    """The package, as Ray's own client of jobs makes it of that checkout and puts it to a cluster."""
    from ray.job_submission import JobSubmissionClient

    if request.param == "by .rayignore alone":
        monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
        monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    packages = []

    def answer(method: str, endpoint: str, *, data: bytes = b"") -> Any:
        if method == "PUT":
            packages.append(data)
        return SimpleNamespace(status_code=404 if method == "GET" else 200)

    client = JobSubmissionClient.__new__(JobSubmissionClient)  # its own start asks a cluster
    monkeypatch.setattr(client, "_do_request", answer)
    client._upload_working_dir_if_needed({"working_dir": str(checkout)})
    (package,) = packages
    return zipfile.ZipFile(io.BytesIO(package))


def test_secrets_runs_and_data_stay_at_home(sent: zipfile.ZipFile):
    files = [name for name in sent.namelist() if not name.endswith("/")]
    assert [name for name in files if SECRET.encode() in sent.read(name)] == []
    assert not set(PLANTED) & set(files)


def test_all_that_a_job_runs_is_sent(checkout: Path, sent: zipfile.ZipFile):
    needed = [
        str(path.relative_to(checkout))
        for folder in ("gmdist", "jobs", "configs")
        for path in (checkout / folder).rglob("*")
        if path.is_file() and str(path.relative_to(checkout)) not in PLANTED
    ]
    assert "gmdist/data/shard.py" in needed  # /data/ is the data sets' folder, and not this one
    assert set(needed) <= set(sent.namelist())
    assert "requirements.txt" in sent.namelist()
