"""What a worker checks before it begins."""

from pathlib import Path

import pytest

from gmdist import storage
from gmdist.config import load
from gmdist.errors import ConfigError
from gmdist.launch.lease import LEASE_NAME
from gmdist.launch.worker import check_reach

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/autoencoder_kl.yaml")


def test_a_run_folder_that_only_the_driver_sees_is_refused(tmp_path: Path) -> None:
    config = load(CONFIG, [f"run.dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"run\.dir: .*/run; a worker on .* does not see .* a shared folder or s3://"):
        check_reach(config)
    storage.write(f"{tmp_path}/run/{LEASE_NAME}", b"{}")
    check_reach(config)
