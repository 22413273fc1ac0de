"""Fixtures for all tests: the digits, a device, one Ray cluster for the whole session."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set: folders train and test. Read only."""
    from gmdist.data.samples import make

    folder = tmp_path_factory.mktemp("digits")
    make("digits", str(folder))
    return folder


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
