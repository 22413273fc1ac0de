"""The fixtures of tests of latent caches. All are read only."""

import pytest

from gmdist.launch.encode import encode
from tests.launch.latents import ALONE, SOME_BAD, train_first_stage, write


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data set; the image of k7 is damaged."""
    return write(tmp_path_factory.mktemp("images") / "data", {7: {"png": b"\x89PNG\r\n\x1a\n damaged"}})


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, images: str) -> str:
    """A first stage after three steps."""
    return train_first_stage(tmp_path_factory.mktemp("stage") / "run", images, *SOME_BAD)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, stage: str, images: str) -> str:
    """Its latents."""
    folder = tmp_path_factory.mktemp("cache") / "data"
    encode(stage, images, str(folder), ALONE)
    return str(folder)
