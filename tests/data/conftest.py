"""Fixtures for the tests of reading."""

import pytest

from tests.data.numbered import write


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain"))
