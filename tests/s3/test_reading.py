"""What users do with a bucket: mix it with a folder, pack into it, interrupt, kill, and reach it wrongly."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmdist import s3, storage
from gmdist.data.config import DataConfig, MixedConfig
from gmdist.data.encode import Encoding
from gmdist.data.index import check_folder, index_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.pack import pack
from gmdist.errors import ConfigError, StorageError
from tests.s3.proxy import Fault, FaultProxy

pytestmark = pytest.mark.s3

DIGITS = {"batch_size": 60, "image_size": 32, "channels": 1, "num_classes": 10}


def test_a_mix_of_buckets_and_folders_has_one_order(
    bucket: str, stored_digits: str, digits: Path, tmp_path: Path
) -> None:
    def digests(train: str, test: str, world_size: int, **changes) -> list[int]:
        mix = [MixedConfig(train, 3), MixedConfig(test, 2)]
        config = DataConfig(**DIGITS, **changes)
        totals = np.zeros(8, np.uint64)
        for rank in range(world_size):
            batches = Loader(config, mix, rank, world_size).batches(0)
            totals += np.array([part.digest for part in islice(batches, 8)]).astype(np.uint64)
            batches.close()
        return totals.tolist()

    here = (f"{digits}/train", f"{digits}/test")
    expected = digests(*here, 1)
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.01}
    assert digests(f"{stored_digits}/train", f"{stored_digits}/test", 3) == expected
    assert digests(f"{stored_digits}/train", here[1], 2, prefetch_mib=1) == expected
    assert digests(here[0], f"{stored_digits}/test", 5, **cache) == expected
    assert digests(f"{stored_digits}/train", f"{stored_digits}/test", 1, **cache) == expected
    names = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert names == {Manifest.load(folder).hash for folder in here}


def test_several_processes_pack_into_a_bucket(bucket: str, tmp_path: Path) -> None:
    for number in range(120):
        folder = tmp_path / "photos" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    settings = {"encoding": Encoding(32, "webp"), "shard_mib": 0.02}
    here = pack(str(tmp_path / "photos"), str(tmp_path / "packed"), **settings).manifest
    seen = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(tmp_path / "photos"), f"{bucket}/packed", **settings, processes=2, on_progress=interrupt)
    there = pack(str(tmp_path / "photos"), f"{bucket}/packed", **settings, processes=2).manifest
    assert there.hash == here.hash
    assert check_folder(f"{bucket}/packed") == []


def test_an_interrupted_index_ends_at_once(
    proxy: FaultProxy, stored_digits: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in storage.list_names(f"{stored_digits}/test"):
        if name.endswith(".tar"):
            storage.write(f"{bucket}/slow/{name}", storage.read(f"{stored_digits}/test/{name}"))
    slow = threading.Event()

    def decide(path: str, count: int) -> Fault | None:
        if not path.endswith(".tar") or path.endswith("shard-000000.tar"):
            return None
        slow.set()
        return Fault("trickle", after=100)

    proxy.decide = decide
    monkeypatch.setattr("gmdist.ranged._RATE_WINDOW_S", 60.0)  # it would be waited for

    def interrupt(done: int, total: int) -> None:
        assert slow.wait(10.0)
        raise KeyboardInterrupt

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        index_folder(f"{bucket}/slow", interrupt)
    assert time.monotonic() - began_s < 30.0
    proxy.decide = lambda path, count: None
    assert index_folder(f"{bucket}/slow")[1] == []


def test_nothing_is_left_of_a_reader_that_is_killed(
    endpoint: str, bucket: str, stored_digits: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    script = f"""
from gmdist import s3
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
s3.configure(s3.S3Config({endpoint!r}, "us-east-1", "path"))
config = DataConfig(**{DIGITS!r}, cache_dir={str(cache)!r}, cache_gib=0.001, num_threads=3)
for part in Loader(config, "{stored_digits}/train").batches(0):
    print(part.digest, flush=True)
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    reader = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    for _ in range(3):
        assert reader.stdout.readline()
    reader.kill()
    reader.wait()
    with pytest.raises(ProcessLookupError):
        os.killpg(reader.pid, signal.SIGCONT)  # nobody is left of its session
    assert os.listdir(scratch) == []
    assert not shared or set(os.listdir("/dev/shm")) <= shared
    config = DataConfig(**DIGITS, cache_dir=str(cache), cache_gib=0.001)
    Loader(config, f"{stored_digits}/train")  # takes away what was half-written
    assert not any(path.suffix == ".tmp" for path in cache.iterdir())


def test_storage_that_is_reached_wrongly(
    endpoint: str, bucket: str, stored_digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(folder: str) -> str:
        s3.renew_credentials()
        with pytest.raises(StorageError) as caught:
            Manifest.load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with monkeypatch.context() as nobody:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            nobody.delenv(name)
        nobody.setenv("AWS_EC2_METADATA_DISABLED", "true")
        nobody.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        nobody.setenv("AWS_CONFIG_FILE", os.devnull)
        assert "no credentials found; set AWS_ACCESS_KEY_ID" in problem(f"{bucket}/x")
    before = s3.config()
    try:
        s3.configure(s3.S3Config(endpoint, "eu-central-1", "path", timeout_s=5.0))
        assert Manifest.load(f"{stored_digits}/test").num_samples == 296  # the storage's answer names the region
        assert storage.exists(f"{stored_digits}/test/shard-000000.tar")
        s3.configure(s3.S3Config("http://127.0.0.1:9", "us-east-1", "path", timeout_s=2.0))
        assert "127.0.0.1:9" in problem(f"{bucket}/x")
        assert "check data.s3.endpoint_url or AWS_ENDPOINT_URL" in problem(f"{bucket}/x")
        s3.configure(s3.S3Config("http://user:sesame@127.0.0.1:9", "us-east-1", "path", timeout_s=2.0))
        assert "sesame" not in problem(f"{bucket}/x")
        with pytest.raises(ConfigError, match=r"endpoint_url: must not hold credentials"):
            s3.config().validate()
        s3.configure(before)
        with pytest.raises(ConfigError, match=r"'No_Bucket!' cannot be a bucket's name; locations look like s3://"):
            Manifest.load("s3://No_Bucket!/x")
    finally:
        s3.configure(before)
