"""An S3 server of OpenStack Swift for these tests, one for the session, and a proxy that injects faults before it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmdist import ranged, s3, storage
from tests.s3.proxy import FaultProxy
from tests.s3.server import ACCESS_KEY, REGION, SECRET_KEY

BUCKET = "pictures"


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The server's URL. `make test-s3` names the Python that has Swift."""
    python = os.environ.get("GMDIST_S3_PYTHON")
    if not python:
        pytest.skip("needs an S3 server: run `make test-s3`")
    script = Path(__file__).parent / "server.py"
    server = subprocess.Popen([python, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip().partition("=")[2]
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="session")
def bucket(endpoint: str) -> Iterator[str]:
    """A bucket on the server, s3://..., with this process's credentials set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        use(endpoint)
        s3.client().create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
        s3.configure(s3.S3Config())


def use(url: str, timeout_s: float = 60.0) -> None:
    """Let this process find object storage at an endpoint."""
    s3.configure(s3.S3Config(url, REGION, "path", timeout_s=timeout_s))


@pytest.fixture
def proxy(bucket: str, endpoint: str) -> Iterator[FaultProxy]:
    """A proxy before the server, which the process uses during the test."""
    client = s3.client()

    def whole(path: str) -> bytes:
        name, _, key = path.lstrip("/").partition("/")
        return client.get_object(Bucket=name, Key=key)["Body"].read()

    with FaultProxy(int(endpoint.rpartition(":")[2]), whole) as between:
        use(between.url)
        yield between
        use(endpoint)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are noticed within a second, so that a test takes no minutes."""
    monkeypatch.setattr(s3, "_READ_S", 1.0)
    monkeypatch.setattr(ranged, "_RATE_WINDOW_S", 0.5)
    monkeypatch.setattr(ranged, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(ranged, "_BACKOFF_MOST_S", 0.2)
    monkeypatch.setattr(ranged, "counters", ranged.Counters())
    monkeypatch.setattr(ranged, "_budget", ranged.RetryBudget())
    s3.renew_credentials()


@pytest.fixture(scope="session")
def stored_digits(bucket: str, digits: Path) -> str:
    """The digits in the bucket."""
    for split in ("train", "test"):
        for path in sorted((digits / split).iterdir()):
            storage.copy_from_local(str(path), f"{bucket}/digits/{split}/{path.name}")
    return f"{bucket}/digits"
