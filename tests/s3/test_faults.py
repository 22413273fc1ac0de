"""Each way in which object storage fails: the bytes are right, or one line says what to do; nothing hangs."""

import random
import threading
import time
import zlib
from pathlib import Path

import pytest

from gmdist import ranged, s3, storage
from gmdist.data.config import DataConfig
from gmdist.data.fetch import Shards
from gmdist.data.index import check_folder, index_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.errors import DataError, GmdistError, StorageError
from tests.s3.conftest import BUCKET, use
from tests.s3.proxy import Fault, FaultProxy

pytestmark = pytest.mark.s3

CONTENT = bytes(i * 2654435761 >> 13 & 255 for i in range(300_000))
START, STOP = 1000, 299_000


@pytest.fixture(scope="module")
def stored(bucket: str) -> tuple[str, str]:
    """An object's location and ETag."""
    location = f"{bucket}/object"
    storage.write(location, CONTENT)
    return location, storage.stat(location).etag


def read(stored: tuple[str, str]) -> bytes:
    location, etag = stored
    return bytes(ranged.read_range(location, START, STOP, etag=etag, num_bytes=len(CONTENT)))


def once(proxy: FaultProxy, fault: Fault) -> None:
    """Let the first GET of every object fail."""
    proxy.decide = lambda path, count: fault if count == 0 else None


MENDED = [
    Fault("status", code=503, error="SlowDown"),
    Fault("status", code=500, error="InternalError"),
    Fault("status", code=429, error="TooManyRequests"),
    Fault("reset", after=100_000),
    Fault("reset", after=0),
    Fault("close", after=100_000),
    Fault("close", after=0),
    Fault("stall", after=100_000),
    Fault("stall", after=0),
    Fault("trickle", after=100_000),
    Fault("short", after=1),
    Fault("short", after=200_000),
    Fault("whole"),
    Fault("shifted"),
]


@pytest.mark.parametrize("fault", MENDED, ids=lambda fault: f"{fault.kind}-{fault.code}-{fault.after}")
def test_a_fault_that_passes_is_mended(proxy: FaultProxy, stored: tuple[str, str], fault: Fault) -> None:
    once(proxy, fault)
    assert read(stored) == CONTENT[START:STOP]
    counters = ranged.counters.snapshot()
    assert (counters["requests"], counters["retries"]) == (2, 1)
    assert counters["stalls"] == (fault.kind in ("stall", "trickle"))


@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
def test_what_has_come_is_not_asked_for_again(proxy: FaultProxy, stored: tuple[str, str], kind: str) -> None:
    once(proxy, Fault(kind, after=200_000))
    assert read(stored) == CONTENT[START:STOP]
    (_, first), (_, second) = proxy.requests
    assert first == f"bytes={START}-{STOP - 1}"
    begin = int(second.removeprefix("bytes=").partition("-")[0])
    # A reset that comes early takes with it what the kernel holds: that has not come.
    assert START + (0 if kind == "reset" else 100_000) < begin <= START + 200_000
    assert ranged.counters.snapshot()["bytes"] == STOP - START


def test_expired_credentials_are_asked_for_again_once(proxy: FaultProxy, stored: tuple[str, str]) -> None:
    expired = Fault("status", code=400, error="ExpiredToken")
    once(proxy, expired)
    assert read(stored) == CONTENT[START:STOP]
    proxy.decide = lambda path, count: expired
    with pytest.raises(StorageError, match=rf"s3://{BUCKET}/object: the credentials have expired; renew them"):
        read(stored)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", code=403, error="AccessDenied"), "access denied; check the credentials"),
        (Fault("status", code=403, error="RequestTimeTooSkewed"), "clock is wrong; set it"),
        (Fault("status", code=403, error="InvalidAccessKeyId"), "access key is not known"),
        (Fault("status", code=400, error="AuthorizationHeaderMalformed"), "another region; set data.s3.region"),
    ],
)
def test_what_no_attempt_can_mend_fails_at_once(
    proxy: FaultProxy, stored: tuple[str, str], fault: Fault, words: str
) -> None:
    proxy.decide = lambda path, count: fault
    with pytest.raises(StorageError, match=f"s3://{BUCKET}/object: .*{words}") as caught:
        read(stored)
    assert "\n" not in str(caught.value)
    assert len(proxy.requests) == 1


def test_a_read_that_gets_further_may_take_longer(proxy: FaultProxy, stored: tuple[str, str]) -> None:
    def decide(path: str, count: int) -> Fault:
        time.sleep(0.2)
        return Fault("close", after=40_000)  # each time, of 300,000

    use(proxy.url, timeout_s=1.5)
    proxy.decide = decide
    began = time.monotonic()
    assert read(stored) == CONTENT[START:STOP]
    assert time.monotonic() - began > 1.5


def test_a_storage_that_stays_broken_ends_in_time(proxy: FaultProxy, stored: tuple[str, str]) -> None:
    use(proxy.url, timeout_s=2.0)
    proxy.decide = lambda path, count: Fault("status")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"object: stalled: \d+ attempts failed within 2 s .*SlowDown \(503\)"):
        read(stored)
    assert time.monotonic() - began < 10.0


def test_reading_ends_soon_when_it_is_stopped(proxy: FaultProxy, stored: tuple[str, str]) -> None:
    proxy.decide = lambda path, count: Fault("trickle", after=10)
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    location, etag = stored
    with pytest.raises(StorageError, match="stopped"):
        ranged.read_range(location, 0, 1000, etag=etag, num_bytes=len(CONTENT), stopped=stopped)


def test_an_object_that_is_overwritten_is_never_mixed(proxy: FaultProxy, bucket: str) -> None:
    location = f"{bucket}/changing"
    storage.write(location, CONTENT)
    etag = storage.stat(location).etag

    def decide(path: str, count: int) -> Fault | None:
        if count == 0:
            return Fault("close", after=100_000)
        storage.write(location, CONTENT[::-1])
        return None

    proxy.decide = decide
    with pytest.raises(s3.ChangedError, match="changing: the object was overwritten"):
        ranged.read_range(location, 0, len(CONTENT), etag=etag, num_bytes=len(CONTENT))


def copied(stored_digits: str, bucket: str, name: str) -> str:
    """A copy of the stored test digits that a test may harm."""
    for file in storage.list_names(f"{stored_digits}/test"):
        storage.write(f"{bucket}/{name}/{file}", storage.read(f"{stored_digits}/test/{file}"))
    return f"{bucket}/{name}"


def sweep(folder: str) -> int:
    config = DataConfig(train=folder, batch_size=16, image_size=32, channels=1, num_classes=10)
    return sum(part.digest for part in Loader(config, folder).sweep(16)) & (2**64 - 1)


def test_a_flipped_bit_on_its_way_is_found_and_asked_for_again(
    proxy: FaultProxy, stored_digits: str, digits: Path
) -> None:
    once(proxy, Fault("flip", after=700))
    assert sweep(f"{stored_digits}/test") == sweep(str(digits / "test"))
    assert proxy.faults > 5


@pytest.mark.parametrize("place", [700, 20])  # in an image, in the first header
def test_a_bit_that_flips_while_indexing_or_checking_does_no_harm(
    proxy: FaultProxy, stored_digits: str, bucket: str, place: int
) -> None:
    folder = copied(stored_digits, bucket, f"indexed-{place}")
    for file in storage.list_names(folder):
        if not file.endswith(".tar"):
            storage.delete(f"{folder}/{file}")
    seen: set[str] = set()

    def decide(path: str, count: int) -> Fault | None:
        if not path.endswith(".tar") or path in seen:
            return None
        seen.add(path)
        return Fault("flip", after=place)

    proxy.decide = decide
    manifest, problems = index_folder(folder)
    assert (problems, manifest.hash) == ([], Manifest.load(f"{stored_digits}/test").hash)
    assert proxy.faults == 4
    seen.clear()
    assert check_folder(folder) == []
    assert proxy.faults == 8


def test_a_third_of_all_answers_are_damaged(proxy: FaultProxy, stored_digits: str, digits: Path) -> None:
    draw = random.Random(0)
    harms = [Fault("flip", after=300), Fault("short", after=1)]
    proxy.decide = lambda path, count: draw.choice(harms) if draw.random() < 0.35 else None
    expected = sweep(str(digits / "test"))
    assert [sweep(f"{stored_digits}/test") for _ in range(8)] == [expected] * 8
    assert proxy.faults > 30


def test_a_flipped_bit_in_the_bucket_names_the_sample(bucket: str, stored_digits: str) -> None:
    folder = copied(stored_digits, bucket, "flipped")
    name = f"{folder}/shard-000001.tar"
    content = bytearray(storage.read(name))
    content[600] ^= 1
    storage.write(name, bytes(content))
    with pytest.raises(DataError, match=r"shard-000001\.tar: sample '\d+' is not what was indexed .*gmdist data check"):
        sweep(folder)


def test_a_shard_that_is_overwritten_says_that_the_data_set_changed(bucket: str, stored_digits: str) -> None:
    from gmdist.data.index import index_folder

    folder = copied(stored_digits, bucket, "overwritten")
    index_folder(folder)  # with the ETags of the bucket
    shards = Shards(folder, Manifest.load(folder))
    shards.read(0, 0)
    name = shards.location(0)
    storage.write(name, storage.read(name)[::-1])
    with pytest.raises(DataError, match=r"shard-000000\.tar: the data set changed under the run: .*gmdist data index"):
        shards.read(0, 1)


def test_a_copy_has_other_versions_of_the_same_bytes(bucket: str, stored_digits: str) -> None:
    folder = copied(stored_digits, bucket, "moved")
    index_folder(folder)
    manifest = Manifest.load(folder)
    manifest.shards.columns["etag"][:] = b"0123456789abcdef-2"  # of the bucket that it was copied from, in parts
    shards = Shards(folder, manifest)
    members = shards.read(0, 0)
    assert {name: bytes(content) for name, content in members.items()} == {
        name: bytes(content) for name, content in Shards(folder, Manifest.load(folder)).read(0, 0).items()
    }
    name = shards.location(0)
    storage.write(name, storage.read(name)[::-1])
    with pytest.raises(DataError, match=r"shard-000000\.tar: the data set changed under the run"):
        shards.read(0, 1)
    other = shards.location(1)
    storage.write(other, storage.read(other)[::-1])
    with pytest.raises(DataError, match=r"shard-000001\.tar: sample '\d+' is not what was indexed"):
        shards.read(1, 0)


def test_a_shard_that_is_gone_names_the_manifest(bucket: str, stored_digits: str) -> None:
    folder = copied(stored_digits, bucket, "gone")
    storage.delete(f"{folder}/shard-000002.tar")
    with pytest.raises(
        DataError, match=rf"s3://{BUCKET}/gone/shard-000002\.tar: .*manifest\.json lists it \(shard 2\)"
    ):
        sweep(folder)


def test_an_index_that_is_damaged_on_its_way_is_asked_for_again(
    proxy: FaultProxy, stored_digits: str, digits: Path
) -> None:
    proxy.decide = lambda path, count: Fault("flip", after=100) if count == 0 and "index" in path else None
    assert sweep(f"{stored_digits}/test") == sweep(str(digits / "test"))
    assert proxy.faults >= 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "sesame"}, "secret key is wrong|access denied"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access key is not known|access denied|secret key"),
    ],
)
def test_wrong_credentials_are_said_and_never_shown(
    stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3.renew_credentials()
    with pytest.raises(StorageError, match=words) as caught:
        read(stored)
    assert not any(value in str(caught.value) for value in settings.values())


def test_a_missing_bucket_and_an_empty_prefix(bucket: str) -> None:
    with pytest.raises(GmdistError, match="s3://no-such-bucket-here/.*no such bucket"):
        Manifest.load("s3://no-such-bucket-here/x")
    with pytest.raises(DataError, match=f"s3://{BUCKET}/nothing: no such data set, or it is empty"):
        Manifest.load(f"{bucket}/nothing")


def test_large_objects_go_in_parts(bucket: str, tmp_path: Path) -> None:
    content = CONTENT * 70  # 21 MB: boto3 uploads it in parts
    (tmp_path / "large").write_bytes(content)
    storage.copy_from_local(str(tmp_path / "large"), f"{bucket}/large")
    assert storage.checksum(f"{bucket}/large") == (len(content), zlib.crc32(content))
