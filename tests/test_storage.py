"""Storage: local folders and S3 behave alike, writing is atomic, errors name the location."""

import errno
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError

from gmdist import s3, storage
from gmdist.data.config import DataConfig
from gmdist.data.decode import UndecodableError, decode_image
from gmdist.data.fetch import Shards
from gmdist.data.index import check_folder, index_folder
from gmdist.data.loader import Loader
from gmdist.data.manifest import Manifest
from gmdist.data.pack import write_shards
from gmdist.errors import ConfigError, DataError, StorageError
from tests.support import deletes_refused

BUCKET = "pictures"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "folder")
    request.getfixturevalue("bucket")
    return f"s3://{BUCKET}/some/folder"


def test_what_is_written_is_read(folder: str) -> None:
    location = storage.join(folder, "deep", "er", "file äöü 1.bin")
    for content in (b"first", b"", bytes(range(256)) * 100):
        storage.write(location, content)
        assert storage.read(location) == content
        assert storage.stat(location).num_bytes == len(content)


@pytest.mark.parametrize("scheme", ["s3", "https", "redis"])
def test_credentials_in_a_location_are_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(ConfigError, match="must not hold credentials: .*; use s3://bucket/prefix") as error:
        storage.is_s3(f"{scheme}://key:sesame@bucket/run")
    assert "sesame" not in str(error.value)
    assert storage.is_s3("s3://bucket/a@b")
    assert not storage.is_s3("runs/ada@home")


def test_a_bucket_has_a_name() -> None:
    for location in ("s3://", "s3:///", "s3:///key"):
        with pytest.raises(ConfigError, match=r"not a location that gmdist reads; use s3://bucket/prefix"):
            storage.is_s3(location)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for access in (storage.read, lambda location: storage.write(location, b"")):
        with pytest.raises(StorageError, match=rf"meta.json: Not a directory; {tmp_path}/run is a file, where a fol"):
            access(f"{tmp_path}/run/step/meta.json")


def test_ranges(folder: str) -> None:
    location = storage.join(folder, "x")
    content = bytes(range(200))
    storage.write(location, content)
    version = storage.stat(location)
    for offset, count in ((0, 200), (0, 1), (199, 1), (50, 100), (0, 0), (77, 0)):
        assert storage.read_range(location, offset, count, version) == content[offset : offset + count]
    for offset, count in ((0, 201), (199, 2), (200, 1), (5000, 10)):
        with pytest.raises(StorageError, match=re.escape(location)):
            storage.read_range(location, offset, count, version)


def test_what_is_missing_is_not_found(folder: str) -> None:
    location = storage.join(folder, "nothing")
    storage.write(storage.join(folder, "nothing-but", "this"), b"")
    for call in (storage.read, storage.stat, lambda missing: storage.read_range(missing, 0, 1, storage.Stat(1, ""))):
        with pytest.raises(FileNotFoundError, match=re.escape(location)):
            call(location)
    assert not storage.exists(location)
    storage.delete(location)
    storage.delete_tree(location)


def test_the_version_changes_with_the_content(folder: str) -> None:
    location = storage.join(folder, "x")
    storage.write(location, b"one")
    before = storage.stat(location)
    assert storage.stat(location) == before
    storage.write(location, b"two")
    assert storage.stat(location).etag != before.etag


def test_names_are_listed(folder: str) -> None:
    assert storage.list_names(folder) == []
    for name in ("b.tar", "a.tar", "step-2/x", "step-2/y/z", "step-10/x"):
        storage.write(storage.join(folder, *name.split("/")), b"")
    for spelled in (folder, folder + "/"):
        assert storage.list_names(spelled) == ["a.tar", "b.tar", "step-10", "step-2"]
    assert storage.list_names(storage.join(folder, "step-2")) == ["x", "y"]
    assert storage.list_names(storage.join(folder, "step-")) == []
    assert storage.exists(storage.join(folder, "a.tar"))
    assert not storage.exists(storage.join(folder, "step-2"))


@pytest.mark.parametrize("end", ["", "/"])
def test_deleting_takes_what_is_named_and_nothing_else(folder: str, end: str) -> None:
    for name in ("run/x", "run/deep/y", "run-2/x", "run.txt"):
        storage.write(storage.join(folder, *name.split("/")), b"")
    storage.delete(storage.join(folder, "run.txt"))
    assert storage.list_names(folder) == ["run", "run-2"]
    storage.delete_tree(storage.join(folder, "run") + end)
    assert storage.list_names(folder) == ["run-2"]
    assert storage.list_names(storage.join(folder, "run")) == []


def test_a_file_that_is_to_go_first_goes_first(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "meta.json", "z", "meta.json-2"):
        storage.write(storage.join(folder, "x", name), b"")

    def fails(*_: object, **__: object) -> None:
        raise StorageError("no")

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", fails)
        broken.setattr(s3, "delete_objects", fails)
        with pytest.raises(StorageError):
            storage.delete_tree(storage.join(folder, "x"), first="meta.json")
    assert storage.list_names(storage.join(folder, "x")) == ["a", "meta.json-2", "z"]
    storage.delete_tree(storage.join(folder, "x"), first="meta.json")
    assert storage.list_names(folder) == []
    storage.delete_tree(storage.join(folder, "x"), first="meta.json")


@pytest.mark.parametrize("end", ["", "/"])
def test_what_a_link_leads_to_stays(tmp_path: Path, end: str) -> None:
    storage.write(str(tmp_path / "there/meta.json"), b"kept")
    for target in ("there", "there/meta.json", "nowhere", "here"):
        (tmp_path / "here").symlink_to(target)
        storage.delete_tree(f"{tmp_path}/here{end}", first="meta.json")
        assert os.listdir(tmp_path) == ["there"]
    assert (tmp_path / "there/meta.json").read_bytes() == b"kept"


def test_an_object_that_is_not_deleted_is_named(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        storage.write(f"s3://{BUCKET}/folder/{name}", b"")
    words = rf"^s3://{BUCKET}/folder/b: access denied; check the credentials'"
    with deletes_refused("AccessDenied", only="folder/b"), pytest.raises(StorageError, match=words):
        storage.delete_tree(f"s3://{BUCKET}/folder")
    assert storage.list_names(f"s3://{BUCKET}/folder") == ["b"]
    monkeypatch.setattr(s3.time, "sleep", lambda _: None)
    with deletes_refused("SlowDown"), pytest.raises(StorageError, match=rf"^s3://{BUCKET}/folder/b: .*SlowDown"):
        storage.delete_tree(f"s3://{BUCKET}/folder")
    with deletes_refused("SlowDown", times=2):  # which passes
        storage.delete_tree(f"s3://{BUCKET}/folder")
    assert storage.list_names(f"s3://{BUCKET}/folder") == []


def test_copies_of_local_files(folder: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(b"<html>")
    storage.copy_from_local(str(tmp_path / "report.html"), storage.join(folder, "copy.html"))
    assert storage.read(storage.join(folder, "copy.html")) == b"<html>"


@pytest.mark.parametrize(
    "location",
    ["pipe:cat /etc/passwd", "http://host/x.tar", "gs://bucket/x", "file:///etc/passwd", "S3://bucket/x", "s3:/b/x"],
)
def test_other_schemes_are_refused(location: str) -> None:
    for call in (
        storage.read,
        storage.stat,
        storage.exists,
        storage.list_names,
        storage.delete,
        storage.delete_tree,
        storage.absolute,
        lambda url: storage.read_range(url, 0, 1, storage.Stat(1, "")),
        lambda url: storage.write(url, b""),
        lambda url: storage.copy_from_local(__file__, url),
    ):
        with pytest.raises(ConfigError, match=rf"^{re.escape(location)}: .*s3://bucket/prefix or a local path"):
            call(location)


def test_locations_are_the_same_from_every_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.absolute("runs/x") == f"{tmp_path}/runs/x"
    assert storage.absolute("~/runs/x") == "/home/somebody/runs/x"
    assert storage.absolute("s3://bucket/runs/x/") == "s3://bucket/runs/x"
    assert storage.join("s3://bucket/runs/", "x", "y") == "s3://bucket/runs/x/y"


def test_overwriting_leaves_nothing_behind(tmp_path: Path) -> None:
    for content in (b"1", b"22", b"333"):
        storage.write(str(tmp_path / "x"), content)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    location = str(tmp_path / "x")
    storage.write(location, b"old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=rf"^{re.escape(location)}: {os.strerror(code)}; .*{words}"):
        storage.write(location, b"new")
    assert os.listdir(tmp_path) == ["x"]
    assert storage.read(location) == b"old"


def test_deleting_what_somebody_else_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(str(tmp_path / "x/y/z"), b"")
    rmtree, calls = shutil.rmtree, []

    def late(folder: str) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, "gone", "z")
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", late)
    storage.delete_tree(str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_where_no_file_can_be_made(tmp_path: Path) -> None:
    for location in ("/proc/x.png", "/proc/none/x.png"):
        with pytest.raises(StorageError, match=f"^{location}: .*choose another folder"):
            storage.write(location, b"")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"kept")
    with pytest.raises(StorageError, match=f"{tmp_path}/x/y"):
        storage.write(str(tmp_path / "x" / "y"), b"")
    with pytest.raises(StorageError, match=f"{tmp_path}: "):
        storage.read(str(tmp_path))
    assert (tmp_path / "x").read_bytes() == b"kept"


def test_a_missing_bucket_is_named(bucket, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    location = "s3://no-such-bucket/folder/x"
    for call in (
        storage.read,
        storage.list_names,
        storage.delete_tree,
        lambda url: storage.read_range(url, 0, 1, storage.Stat(1, "")),
        lambda url: storage.write(url, b""),
        lambda url: storage.copy_from_local(str(tmp_path / "x"), url),
    ):
        with pytest.raises(StorageError, match=rf"(?i)^{location}: .*bucket"):
            call(location)


def test_errors_are_one_line(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(f"s3://{BUCKET}/x", b"123")
    with pytest.raises(StorageError) as caught:
        storage.read_range(f"s3://{BUCKET}/x", 1, 5, storage.stat(f"s3://{BUCKET}/x"))
    assert "\n" not in str(caught.value)
    s3.renew_credentials()
    with monkeypatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        environment.setenv("AWS_CONFIG_FILE", os.devnull)
        with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/x: .*credentials"):
            storage.read(f"s3://{BUCKET}/x")


class Expired:
    """A client whose credentials were good until a moment ago."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            error = ClientError({"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}, name)
            raise S3UploadFailedError(f"Failed to upload: {error}") if name == "upload_fileobj" else error

        return refuse


def test_credentials_that_were_renewed_are_taken_whatever_is_asked_for(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    client, renewed = s3.client, []
    folder = f"s3://{BUCKET}/rotated"
    monkeypatch.setattr(s3, "client", lambda **how: client(**how) if renewed else Expired())
    monkeypatch.setattr(s3, "renew_credentials", lambda: renewed.append(True))
    monkeypatch.setattr(storage, "_PIECE_BYTES", 8)
    asked: list[Callable[[], Any]] = [
        lambda: storage.write(f"{folder}/a", b"in one"),
        lambda: storage.write(f"{folder}/b", b"in several parts"),
        lambda: storage.copy(f"{folder}/a", f"{folder}/c"),
        lambda: storage.list_names(folder),
        lambda: storage.delete(f"{folder}/c"),
        lambda: storage.delete_leftovers(folder, re.compile("x")),
        lambda: storage.delete_tree(folder, first="a"),
    ]
    for ask in asked:
        renewed.clear()
        ask()
        assert renewed
    assert storage.list_names(folder) == []


def test_more_objects_than_fit_a_page(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for i in range(35):
        bucket.put_object(Bucket=BUCKET, Key=f"many/{i:02d}", Body=b"")
    assert bucket.list_objects_v2(Bucket=BUCKET, Prefix="many/")["KeyCount"] == 10
    assert storage.list_names(f"s3://{BUCKET}/many") == [f"{i:02d}" for i in range(35)]
    storage.delete_tree(f"s3://{BUCKET}/many")
    assert storage.list_names(f"s3://{BUCKET}/many") == []


def test_the_whole_bucket_is_a_folder(bucket) -> None:
    for root in (f"s3://{BUCKET}", f"s3://{BUCKET}/"):
        storage.write(storage.join(root, "deep", "x"), b"1")
        assert storage.list_names(root) == ["deep"]
        assert storage.read(storage.join(root, "deep", "x")) == b"1"
        storage.delete_tree(root)
        assert storage.list_names(root) == []


def test_folder_marks_of_consoles_are_no_files(bucket) -> None:
    bucket.put_object(Bucket=BUCKET, Key="made/by/hand/", Body=b"")
    assert storage.list_names(f"s3://{BUCKET}/made/by/hand") == []
    with pytest.raises(DataError, match="no such data set, or it is empty"):
        Manifest.load(f"s3://{BUCKET}/made/by/hand")


def test_a_data_set_is_the_same_on_s3(bucket, digits: Path) -> None:
    # Copied as `aws s3 sync` would, and indexed again where it is.
    there = f"s3://{BUCKET}/digits"
    for path in (digits / "test").iterdir():
        storage.copy_from_local(str(path), f"{there}/{path.name}")

    def digests(folder: str) -> tuple[list[int], str]:
        config = DataConfig(train=folder, batch_size=64, image_size=32, channels=1, num_classes=10)
        loader = Loader(config, folder)
        return [part.digest for part in loader.sweep(64)], loader.fingerprint

    here = digests(str(digits / "test"))
    assert digests(there) == here
    assert check_folder(there) == []
    _, problems = index_folder(there)
    assert problems == []
    assert digests(there) == here


def test_empty_members_are_empty(folder: str) -> None:
    manifest = write_shards([("a", {"png": b""}), ("b", {"png": b"x" * 600})], folder)
    shards = Shards(folder, manifest)
    assert shards.read(0, 0) == {"png": b""}
    assert shards.read(0, 1) == {"png": b"x" * 600}
    with pytest.raises(UndecodableError):
        decode_image(shards.read(0, 0)["png"], 3)


def test_checksum_of_a_file_larger_than_a_piece(folder, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_PIECE_BYTES", 7)
    content = bytes(range(50))
    storage.write(f"{folder}/a", content)
    assert storage.checksum(f"{folder}/a") == (50, zlib.crc32(content))
    with pytest.raises(FileNotFoundError):
        storage.checksum(f"{folder}/none")


def test_large_files_are_written_in_parts(folder, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # 10 MB
    with open(tmp_path / "source", "wb+") as file:
        file.write(content)
        storage.write_from(f"{folder}/a", file)
    assert storage.read(f"{folder}/a") == content
    parts = storage.stat(f"{folder}/a").etag.rpartition("-")[2]
    assert parts == "2" or not storage.is_s3(folder)


def test_files_are_listed_with_their_versions(folder) -> None:
    assert storage.list_stats(folder) == {}
    for name in ("b", "a", "deep/c"):
        storage.write(f"{folder}/{name}", name.encode())
    assert storage.list_stats(folder) == {name: storage.stat(f"{folder}/{name}") for name in ("a", "b")}
    assert list(storage.list_stats(folder)) == ["a", "b"]


def test_an_open_file_is_read_in_pieces_of_one_version(folder, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_PIECE_BYTES", 100)
    content = bytes(range(250)) * 3
    storage.write(f"{folder}/a", content)
    version = storage.stat(f"{folder}/a")
    with storage.open_read(f"{folder}/a", version) as file:
        assert [file.read(300), file.read(7), file.read(), file.read()] == [
            content[:300],
            content[300:307],
            content[307:],
            b"",
        ]
    if storage.is_s3(folder):
        with storage.open_read(f"{folder}/a", version) as file:
            assert file.read(10) == content[:10]
            storage.write(f"{folder}/a", b"other")
            with pytest.raises(s3.ChangedError):
                file.read()


def test_what_killed_writers_left_is_deleted(folder, request) -> None:
    storage.write(f"{folder}/a.tar", b"whole")
    storage.write(f"{folder}/deep/b.tar", b"whole")
    if storage.is_s3(folder):
        client = request.getfixturevalue("bucket")
        for name in ("a.tar", "deep/a.tar", "theirs.tar"):
            client.create_multipart_upload(Bucket=BUCKET, Key=f"some/folder/{name}")
        storage.delete_leftovers(folder)
        assert len(client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]) == 3
        storage.delete_leftovers(folder, re.compile(r"a\.tar"))
        left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
        assert [upload["Key"] for upload in left] == ["some/folder/deep/a.tar", "some/folder/theirs.tar"]
    else:
        for name in (f".a.tar.{'0' * 32}.tmp", "mine.tmp", f"deep/.b.tar.{'0' * 32}.tmp"):
            Path(folder, name).write_bytes(b"part")
        storage.delete_leftovers(folder)
        assert sorted(path.name for path in Path(folder).rglob("*.tmp")) == [f".b.tar.{'0' * 32}.tmp", "mine.tmp"]
    assert storage.read(f"{folder}/a.tar") == b"whole"


def test_an_object_of_json_is_what_was_written_or_an_error(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    location, content = f"{folder}/a.json", {"b": [1, 2.5, None], "a": {"text": "\u00e4"}}
    with pytest.raises(FileNotFoundError):
        storage.read_json(location)
    storage.write_json(location, content)
    assert storage.read_json(location) == content
    sound = storage.read(location)
    deep = b"[" * 200_000
    for damaged in (sound.replace(b"2.5", b"3.5"), sound[:-5], b"[]", b"{}", b"\xff", b'{"crc32": "x"}', deep):
        storage.write(location, damaged)
        with pytest.raises(ValueError, match=r"."):
            storage.read_json(location)

    storage.write(location, sound)
    answers = [sound.replace(b"2.5", b"3.5"), sound[:20], sound]  # damaged on their way, twice
    monkeypatch.setattr(storage, "read", lambda _: answers.pop(0))
    assert storage.read_json(location) == content


def test_a_proxy_that_does_not_answer_is_no_fault_of_a_path() -> None:
    from botocore.exceptions import ProxyConnectionError

    with (
        pytest.raises(
            StorageError, match=r"^s3://bucket/x: .*proxy.*; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY$"
        ) as caught,
        storage.naming("s3://bucket/x"),
    ):
        raise ProxyConnectionError(proxy_url="http://user:secret@host:1")
    assert "secret" not in str(caught.value)
