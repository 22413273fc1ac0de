"""Shards: what is written is what is read, by us and by stock webdataset; whatever is unsound is refused by name."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset

from gmdist.data.index import index_folder
from gmdist.data.manifest import MANIFEST_NAME, Manifest, ShardTable
from gmdist.data.shard import (
    ShardIndex,
    ShardWriter,
    index_name,
    load_index,
    parse_label,
    scan,
)
from gmdist.data.tar import MAX_MEMBER_BYTES
from gmdist.errors import DataError

# Sizes around the 512-byte blocks of tar, none included; a sample without a label; names beyond ASCII.
SAMPLES = [
    ("a", {"png": b"", "cls": b"3"}),
    ("b", {"png": b"x" * 511, "cls": b"0"}),
    ("ключ 1", {"jpg": b"\0" * 512, "cls": b"12\n"}),
    ("d", {"png": bytes(range(256)) * 5, "seg.png": b"mask", "json": b"{}"}),
]


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive(*members, **settings) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **({"format": tarfile.USTAR_FORMAT} | settings)) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def save(folder: Path, samples=SAMPLES, name: str = "shard-0.tar") -> Manifest:
    writer = ShardWriter()
    for key, members in samples:
        writer.add(key, members)
    manifest = Manifest(ShardTable.of([writer.save(str(folder), name)]), ("cat", "dog"))
    manifest.save(str(folder))
    return manifest


def contents(shard: bytes, index: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of a shard as its index says."""
    found = []
    for sample in (index[i] for i in range(len(index))):
        members = {e: shard[m.offset : m.offset + m.num_bytes] for e, m in sample.members.items()}
        assert all(zlib.crc32(members[e]) == m.crc32 for e, m in sample.members.items())
        found.append((sample.key, members))
    return found


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    (entry,) = save(tmp_path).shards
    shard = (tmp_path / entry.name).read_bytes()
    assert (entry.samples, entry.num_bytes, entry.labels) == (4, len(shard), 13)
    index = load_index(str(tmp_path), entry)
    assert contents(shard, index) == SAMPLES
    scanned, labels = scan(io.BytesIO(shard), entry.name)
    assert labels == 13
    assert [scanned[i] for i in range(4)] == [index[i] for i in range(4)]
    assert Manifest.load(str(tmp_path)) == Manifest(ShardTable.of([entry]), ("cat", "dog"))


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    # Every file, the index included: the manifest's hash covers it, and a run resumes on no other hash.
    def files(name: str) -> tuple[list[bytes], str]:
        manifest = save(tmp_path / name)
        return [(tmp_path / name / file).read_bytes() for file in ("shard-0.tar", "shard-0.index.safetensors")], (
            manifest.hash
        )

    assert len({str(files(f"{i}")) for i in range(8)}) == 1


def test_a_samples_hash_is_of_its_bytes_and_not_of_its_neighbours(tmp_path: Path) -> None:
    def hashes(samples) -> list[int]:
        return load_index(str(tmp_path), save(tmp_path, samples).shards[0]).hashes.tolist()

    together = hashes(SAMPLES)
    assert together == [number for sample in SAMPLES for number in hashes([sample])]
    assert len(set(together)) == len(SAMPLES)
    (a,) = hashes([("k", {"png": b"1", "txt": b"2"})])
    assert hashes([("k", {"txt": b"2", "png": b"1"})]) == [a]
    assert hashes([("k", {"txt": b"1", "png": b"2"})]) != [a]
    assert hashes([("k", {"png": b"1"})]) != [a]


def test_an_index_survives_its_file_and_nothing_else_is_one(tmp_path: Path) -> None:
    (entry,) = save(tmp_path).shards
    index = load_index(str(tmp_path), entry)
    again = ShardIndex.from_bytes(index.to_bytes(), "somewhere")
    assert [again[i] for i in range(len(again))] == [index[i] for i in range(len(index))]
    assert len(ShardIndex.from_bytes(ShardIndex.of([]).to_bytes(), "somewhere")) == 0
    sound = index.to_bytes()
    for content in (
        b"",
        b"garbage",
        sound[:-1],
        sound.replace(b"keys", b"kexs"),
        sound.replace(b'"format"', b'"former"'),
    ):
        with pytest.raises(DataError, match=r"x\.index.*data index"):
            ShardIndex.from_bytes(content, "x.index")
    with pytest.raises(DataError, match=r"x\.index.*format 9"):
        ShardIndex.from_bytes(sound.replace(b'"format":"1"', b'"format":"9"'), "x.index")


def test_stock_webdataset_reads_our_shards(tmp_path: Path) -> None:
    save(tmp_path)
    stock = webdataset.WebDataset([str(tmp_path / "shard-0.tar")], shardshuffle=False)
    read = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in stock]
    assert read == SAMPLES


def test_shards_of_stock_webdataset_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False) as writer:
        for key, members in SAMPLES:
            writer.write({"__key__": f"{'long' * 40}/{key}"} | members)
    manifest, problems = index_folder(str(tmp_path))
    assert problems == []
    assert manifest.num_labels == 13
    index = load_index(str(tmp_path), manifest.shards[0])
    read = contents((tmp_path / "theirs.tar").read_bytes(), index)
    assert dict(read) == {f"{'long' * 40}/{key}": members for key, members in SAMPLES}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_common_tar_is_read(tmp_path: Path, form: int) -> None:
    folder = "d" * 90
    names = [f"{folder}/{'n' * 60}.v2.png", f"{folder}/{'n' * 60}.txt", "./e.png", "v1.0/f.PNG", "v1.0/e.png"]
    if form != tarfile.USTAR_FORMAT:
        names.append("ü" * 120 + ".png")
    members = [member("v1.0", type=tarfile.DIRTYPE)]
    members += [member(name, b"%d" % i * (1 + 300 * i), mtime=1.5) for i, name in enumerate(names)]
    (tmp_path / "any.tar").write_bytes(archive(*members, format=form, pax_headers={"comment": "a global header"}))
    manifest, problems = index_folder(str(tmp_path))
    assert problems == []
    read = contents((tmp_path / "any.tar").read_bytes(), load_index(str(tmp_path), manifest.shards[0]))
    long, *rest = [content for _, content in members[1:]]
    assert read[0] == (f"{folder}/{'n' * 60}", {"v2.png": long, "txt": rest[0]})
    assert read[1:4] == [("e", {"png": rest[1]}), ("v1.0/f", {"png": rest[2]}), ("v1.0/e", {"png": rest[3]})]
    assert read[4:] == [("ü" * 120, {"png": content}) for content in rest[4:]]


A, A_LABEL, B = member("a.png", b"1" * 600), member("a.cls", b"3"), member("b.png", b"2" * 600)
SOUND = archive(A, A_LABEL, B)
B_AT = 2560  # b's header: after two headers, two blocks and one block


def link(kind: bytes) -> bytes:
    return archive(A, member("b.png", type=kind, linkname="/etc/passwd"))


UNSOUND = {
    "flipped header byte": (flipped(SOUND, B_AT + 10), f"damaged tar header at byte {B_AT}"),
    "flipped byte of a size": (flipped(SOUND, B_AT + 130), "damaged tar header"),
    "garbage": (b"garbage " * 200, "damaged tar header at byte 0"),
    "empty file": (b"", "was cut"),
    "cut between members": (SOUND[:B_AT], f"ends at byte {B_AT}.*was cut"),
    "cut in a header": (SOUND[: B_AT + 100], "was cut"),
    "cut in a member": (SOUND[: B_AT + 700], "was cut"),
    "cut in the end": (SOUND[: B_AT + 3 * 512 + 512], "was cut"),
    "two archives": (SOUND + SOUND, "data follows the end"),
    "a hole": (SOUND[:B_AT] + bytes(512) + SOUND[B_AT:], f"zero block at {B_AT}"),
    "interleaved": (archive(A, B, A_LABEL), "members of sample 'a' do not follow"),
    "repeated": (archive(A, B, A), "members of sample 'a' do not follow"),
    "two images": (archive(A, A), "sample 'a' has two members 'png'"),
    "two images but for case": (archive(A, member("a.PNG")), "sample 'a' has two members 'png'"),
    "symbolic link": (link(tarfile.SYMTYPE), "'b.png' is a symbolic link"),
    "hard link": (link(tarfile.LNKTYPE), "'b.png' is a hard link"),
    "device": (link(tarfile.CHRTYPE), "'b.png' is no regular file"),
    "upwards": (archive(A, member("../b.png")), r"'\.\./b\.png' is unsafe"),
    "upwards inside": (archive(A, member("x/../../b.png")), "is unsafe"),
    "absolute": (archive(A, member("/etc/b.png")), "'/etc/b.png' is unsafe"),
    "absolute in PAX": (archive(member("/" + "b" * 200 + ".png"), format=tarfile.PAX_FORMAT), "is unsafe"),
    "backslash": (archive(A, member("..\\b.png")), "is unsafe"),
    "newline": (archive(A, member("a\nb.png")), "is unsafe"),
    "not UTF-8": (archive(A, member("b\udcff.png")), "is unsafe"),
    "gzip": (gzip.compress(archive(member("a.png", random.Random(0).randbytes(2000)))), "compressed with gzip"),
    "small gzip": (gzip.compress(archive(member("a.png"))), "compressed with gzip"),
    "bzip2": (bz2.compress(archive(A)), "compressed with bzip2"),
    "xz": (lzma.compress(archive(A)), "compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
    "of macOS": (archive(A, member("./._a.png")), r"'\._a\.png' is one of those .* with COPYFILE_DISABLE=1"),
    "a folder with content": (archive(A, member("d", bytes(512), type=tarfile.DIRTYPE)), "folder 'd' says 512 bytes"),
    "upwards and back": (archive(A, member("x/../b.png")), r"'x/\.\./b\.png' is unsafe"),
    "one name for all": (
        archive(A, format=tarfile.PAX_FORMAT, pax_headers={"path": "b.png"}),
        "names or sizes all members at once",
    ),
    "endless size": (
        archive(member("a.png", pax_headers={"size": "9" * 5000}), format=tarfile.PAX_FORMAT),
        "damaged PAX header at byte 512",
    ),
    "no extension": (archive(A, member("v1.0/README")), "'v1.0/README' has no key or no extension"),
    "no key": (archive(A, member("x/.png")), "'x/.png' has no key or no extension"),
    "too large": (
        member("a.png", size=MAX_MEMBER_BYTES + 1)[0].tobuf(),
        f"{MAX_MEMBER_BYTES + 1} bytes; at most {MAX_MEMBER_BYTES}",
    ),
    "sparse": (
        archive(member("a.png", pax_headers={"GNU.sparse.major": "1"}), format=tarfile.PAX_FORMAT),
        "sparse member",
    ),
    "damaged PAX header": (
        archive(member("a" * 200 + ".png"), format=tarfile.PAX_FORMAT).replace(b"path=", b"path:"),
        "damaged PAX header at byte 512",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_shards_are_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = UNSOUND[case]
    with pytest.raises(DataError, match=rf"(?s)^bad-7\.tar: .*{message}") as caught:
        scan(io.BytesIO(content), "bad-7.tar")
    (tmp_path / "bad-7.tar").write_bytes(content)
    (tmp_path / "good.tar").write_bytes(SOUND)
    _, problems = index_folder(str(tmp_path))
    assert problems == [str(caught.value).replace("bad-7.tar", f"{tmp_path}/bad-7.tar")]
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize("label", [b"cat", b"-1", b"", b"1" * 30])
def test_what_is_no_label_is_left_to_who_reads_it(tmp_path: Path, label: bytes) -> None:
    (tmp_path / "odd.tar").write_bytes(archive(A, member("a.cls", label), B, member("b.cls", b"2")))
    manifest, problems = index_folder(str(tmp_path))
    assert (problems, manifest.num_samples, manifest.num_labels) == ([], 2, 3)
    assert save(tmp_path / "written", [("a", {"cls": label})]).num_labels == 0


def test_soundness_is_not_refused() -> None:
    # The archive that the cases above damage is itself in order.
    index, labels = scan(io.BytesIO(SOUND), "sound.tar")
    assert (index.keys, labels) == (["a", "b"], 4)


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    before = save(tmp_path / "here").hash
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert Manifest.load(str(tmp_path / "there")).hash == before
    assert index_folder(str(tmp_path / "there"))[0].hash == before
    changed = [("a", {"png": b"", "cls": b"4"}), *SAMPLES[1:]]
    assert save(tmp_path / "changed", changed).hash != before
    assert save(tmp_path / "renamed", name="shard-1.tar").hash != before


def test_no_data_set_says_what_to_do(tmp_path: Path) -> None:
    def refusal(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            Manifest.load(str(folder))
        assert str(folder) in str(caught.value)

    folder = tmp_path / "missing"
    refusal("no such data set, or it is empty.*gmdist data make.*gmdist data pack")
    with pytest.raises(DataError, match=r"missing: no \.tar shards"):
        index_folder(str(folder))

    folder = tmp_path / "empty"
    folder.mkdir()
    refusal("no such data set, or it is empty")

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"")
    refusal(r"no \.tar shards in it.*gmdist data pack")

    folder = tmp_path / "splits"
    for split in ("train", "test"):
        save(folder / split)
    refusal(f"its data sets are {folder}/train and {folder}/test")

    folder = tmp_path / "plain"
    save(folder)
    manifest = folder / MANIFEST_NAME
    json_lines = manifest.read_text()
    sound = json.loads(json_lines)
    manifest.unlink()
    refusal(f"no manifest; run `gmdist data index {folder}`")

    first = sound["shards"][0]
    for content in (
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        json.dumps(sound | {"shards": [{"name": "x"}]}).encode(),
        json.dumps({key: value for key, value in sound.items() if key != "classes"}).encode(),
    ):
        manifest.write_bytes(content)
        refusal(f"not a manifest.*gmdist data index {folder}")
    manifest.write_text(json.dumps(sound | {"format": 1, "shards": [{"name": "x"}]}))
    refusal("format 1; delete it and run `gmdist data index")
    for shards in ([], [first | {"samples": [0]}]):
        manifest.write_text(json.dumps(sound | {"samples": 0, "shards": shards}))
        refusal("no samples")
    lines = json_lines.replace('"labels": [13]', '"labels": [14]')
    assert lines != json_lines
    manifest.write_text(lines)
    refusal("crc32 differs")
    manifest.write_text(json_lines[: json_lines.index('"crc32"')])
    refusal("not a manifest")


@pytest.mark.parametrize(
    "name",
    ["../other.tar", "/etc/other.tar", "deep/er.tar", ".hidden.tar", "a\\b.tar", "a\nb.tar", "manifest.json", ""],
)
def test_a_manifest_that_names_no_shards_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (entry,) = save(tmp_path).shards
    for shards in ([dataclasses.replace(entry, name=name)], [entry, dataclasses.replace(entry, name=name)]):
        Manifest(ShardTable.of(shards)).save(str(tmp_path))
        with pytest.raises(DataError, match=r"not a manifest \(it names a shard that is no file of its folder\)"):
            Manifest.load(str(tmp_path))
    Manifest(ShardTable.of([entry, entry])).save(str(tmp_path))
    with pytest.raises(DataError, match=r"not a manifest \(it names a shard twice\)"):
        Manifest.load(str(tmp_path))


@pytest.mark.parametrize("how", [{"num_bytes": 100}, {"num_bytes": 1 << 45}, {"offset": -1}])
def test_an_index_of_what_is_not_in_the_shard_is_refused(tmp_path: Path, how: dict[str, int]) -> None:
    (entry,) = save(tmp_path).shards
    index = load_index(str(tmp_path), entry)
    samples = [index[i] for i in range(len(index))]
    if "offset" in how or how["num_bytes"] > 100:
        (extension, member), *_ = samples[0].members.items()
        samples[0].members[extension] = member._replace(**how)
    else:
        entry = dataclasses.replace(entry, **how)  # the shard is shorter
    content = ShardIndex.of(samples).to_bytes()
    (tmp_path / index_name(entry.name)).write_bytes(content)
    with pytest.raises(DataError, match=r"index\.safetensors: its samples are not of a shard of \d+ bytes"):
        load_index(str(tmp_path), dataclasses.replace(entry, index_crc32=zlib.crc32(content)))


def test_shards_without_samples_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "nothing.tar").write_bytes(archive())
    with pytest.raises(DataError, match=f"{tmp_path}: the shards hold no samples"):
        index_folder(str(tmp_path))
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_a_member_may_have_the_name_of_a_compressor() -> None:
    assert scan(io.BytesIO(archive(member("BZhang-1.png"))), "a.tar")[0].keys == ["BZhang-1"]


def test_members_about_the_archive_are_no_samples() -> None:
    content = archive(member("__meta__/i.json"), A, member("__stats__"))
    assert scan(io.BytesIO(content), "a.tar")[0].keys == ["a"]


def test_a_mark_before_utf8_is_no_part_of_a_label() -> None:
    assert parse_label(b"\xef\xbb\xbf7\r\n", "a.cls") == 7
