"""Fixtures for all tests: the digits, a device, one Ray cluster for the whole session."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("gmdist", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("gmdist")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests: one has all of Ray, and begins with it; the others go file by file."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = item.nodeid.partition("::")[0] if item.get_closest_marker("ray") is None else "ray"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set: folders train and test. Read only."""
    from gmdist.data.samples import make

    folder = tmp_path_factory.mktemp("digits")
    make("digits", str(folder))
    return folder


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small data set of noise with labels and captions. Read only."""
    from tests.exporting import write_images

    return write_images(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="session")
def noise_stage(noise: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A first stage after two steps on it. Read only."""
    from tests.exporting import train

    return train("autoencoder_kl", noise, tmp_path_factory.mktemp("noise-stage") / "run")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """A client of an S3 inside this process, with one bucket: s3://pictures."""
    import boto3
    from moto import mock_aws

    from gmdist import s3

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        s3.renew_credentials()
        client = boto3.client("s3")
        client.create_bucket(Bucket="pictures")
        yield client
    s3.renew_credentials()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA under `make test-gpu`, the CPU otherwise."""
    if os.environ.get("GMDIST_TEST_DEVICE") != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray cluster on this machine, that `gmdist.launch` joins."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray = pytest.importorskip("ray")
    from gmdist.config import ClusterConfig
    from gmdist.launch.cluster import connected

    with connected(ClusterConfig(num_workers=2)):
        yield ray
