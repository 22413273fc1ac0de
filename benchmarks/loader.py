"""Our loader beside its peers on the same 10,000 photographs of 256x256 (JPEG, 15 KB), in turn, in one process tree.

    make bench-loader

Every contender reads, decodes and batches one epoch after an epoch that warmed its caches, in a process of its own.
Printed are samples a second and samples a CPU-second (of the process and its children), the medians of some rounds, and
the ratios that are asked for. The S3 server is OpenStack Swift on loopback: its own CPU time is not counted.
"""

import argparse
import functools
import gc
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, SHARDS, BATCH, THREADS = 10_000, 20, 64, 2
ROUNDS = 3
HERE = Path(__file__).parent
PEERS = ("webdataset-pil", "webdataset-simplejpeg", "streaming", "litdata")
# What is asked for: (figure, ours, against, ratio).
TARGETS = [
    ("cpu", "local", "webdataset-pil", 3.5),
    ("cpu", "local", "webdataset-simplejpeg", 2.5),
    ("cpu", "local", "streaming", 1.0),
    ("cpu", "local", "litdata", 1.0),
    ("cpu", "local", "decode", 0.9),
    ("cpu", "s3", "local", 0.85),
    ("wall", "local", "webdataset-pil", 1.0),
    ("wall", "local", "streaming", 1.0),
    ("wall", "local", "litdata", 1.0),
    ("wall", "local", "decode", 0.9),
    ("wall", "s3", "local", 0.85),
]


def photographs(folder: Path) -> None:
    """Write the images: windows of scikit-learn's two photographs, as shards with an index."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from gmdist.data.pack import write_shards

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(0)

    def samples():
        for number in range(IMAGES):
            photo, side = photos[number % len(photos)], int(random.integers(200, 420))
            left, top = (int(random.integers(size - side)) for size in photo.size)
            jpeg = io.BytesIO()
            window = photo.resize((256, 256), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            window.save(jpeg, "JPEG", quality=80)
            yield f"{number:05d}", {"jpg": jpeg.getvalue(), "cls": str(number % 10).encode()}

    write_shards(samples(), str(folder), num_shards=SHARDS)
    (folder / "count").write_text(str(IMAGES))


def cpu_s() -> float:
    """CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def decode_alone(folder: str) -> Iterator[int]:
    """Decode images that are in memory, in as many threads, again and again."""
    import simplejpeg

    from gmdist.data.fetch import Shards
    from gmdist.data.manifest import Manifest

    shards = Shards(folder, Manifest.load(folder))
    places = [(s, i) for s, shard in enumerate(shards.manifest.shards) for i in range(shard.samples)]
    contents = [bytes(shards.read(*place)["jpg"]) for place in places]

    def decode(first: int) -> int:
        return sum(len(simplejpeg.decode_jpeg(content)) > 0 for content in contents[first : first + 32])

    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            yield sum(pool.map(decode, range(0, len(contents), 32)))


def ours(folder: str) -> Iterator[int]:
    """Epoch after epoch of our loader, as a run goes through them."""
    from gmdist.data.config import DataConfig
    from gmdist.data.loader import Loader

    config = DataConfig(train=folder, batch_size=BATCH, image_size=256, num_classes=10, num_threads=THREADS)
    batches = Loader(config, folder).batches(0)
    while True:
        yield sum(len(next(batches).tensors["label"]) for _ in range(IMAGES // BATCH))


def resume(folder: str) -> None:
    """How long the first batch takes where a run goes on, and what is read for it."""
    from gmdist.data.config import DataConfig
    from gmdist.data.loader import Loader

    config = DataConfig(train=folder, batch_size=BATCH, image_size=256, num_classes=10, num_threads=THREADS)
    loader = Loader(config, folder)  # boto3 takes some time to start, and any run takes it
    worst: dict[str, float] = {}
    for place in np.linspace(0.0, 0.999, 12):
        before, began_s = loader.counters(), time.perf_counter()
        batches = Loader(config, folder).batches(int(place * loader.num_samples))
        next(batches)
        seconds, after = time.perf_counter() - began_s, loader.counters()
        batches.close()
        read = {name: after[name] - before.get(name, 0.0) for name in ("bytes", "requests")}
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in (read | {"s": seconds}).items()}
    print(json.dumps(worst))


def scale(_: str) -> None:
    """A data set of a million shards: how long its manifest takes to open, and where its samples are."""
    from gmdist.data.manifest import Manifest, ShardTable
    from gmdist.data.tape import Tape, owned

    shards, samples, workers = 1_000_000, 1000, 1024
    numbers = np.arange(shards)
    columns = {
        "name": np.char.add(np.char.add(b"shard-", np.char.zfill(numbers.astype("S7"), 7)), b".tar"),
        "etag": np.char.zfill(numbers.astype("S32"), 32),
        **dict.fromkeys(("samples", "num_bytes", "index_crc32"), np.full(shards, samples)),
        "labels": np.full(shards, 10),
    }
    with tempfile.TemporaryDirectory() as folder:
        Manifest(ShardTable(columns)).save(folder)
        del columns
        figures = json.loads(subprocess.check_output([sys.executable, __file__, "--measure", "open", folder]))
        tape = Tape(Manifest.load(folder).shards.columns["samples"], seed=0, lanes=240, block=273, manifest="")
    asked = np.random.default_rng(0).integers(0, tape.num_samples, 1 << 20)
    tape.locate(asked[:1])  # the epoch's order of shards is drawn once
    for at_once in (1 << 14, 64):
        began_s = time.perf_counter()
        for first in range(0, 64 * at_once, at_once):
            tape.locate(asked[first : first + at_once])
        figures[f"locate_{at_once}_us"] = (time.perf_counter() - began_s) / (64 * at_once) * 1e6
    start, count = 7 * tape.num_samples - 12_345, 1 << 20  # over the end of an epoch
    woven = np.empty((2, count), np.int64)
    for rank in range(workers):
        mine = owned(start, start + count, rank, workers)
        woven[:, mine - start] = tape.locate(mine)
    figures["one_order"] = bool((woven == np.stack(tape.locate(np.arange(start, start + count)))).all())
    print(json.dumps(figures))


def open_manifest(folder: str) -> None:
    """Seconds and MB that a manifest takes."""
    from gmdist.data.manifest import Manifest

    before_mb, began_s = peak_mb(), time.perf_counter()
    Manifest.load(folder)
    print(json.dumps({"open_s": time.perf_counter() - began_s, "mb": peak_mb() - before_mb}))


def peak_mb() -> float:
    """The most memory that this process has had (Linux); getrusage counts that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def epoch(run: Callable[[str], Iterator[int]], folder: str) -> None:
    """Print the figures of an epoch, after one that warms caches."""
    gc.freeze()  # as a worker does
    epochs = run(folder)
    next(epochs)
    began_s, began_cpu_s = time.perf_counter(), cpu_s()
    count = next(epochs)
    print(json.dumps({"samples": count, "wall_s": time.perf_counter() - began_s, "cpu_s": cpu_s() - began_cpu_s}))


MEASURED: dict[str, Callable[[str], None]] = {
    "decode": functools.partial(epoch, decode_alone),
    "local": functools.partial(epoch, ours),
    "s3": functools.partial(epoch, ours),
    "resume": resume,
    "scale": scale,
    "open": open_manifest,
}


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python that has the peers; without it only ours are measured")
    parser.add_argument("--s3", help="the Python that has OpenStack Swift; without it nothing is read from S3")
    parser.add_argument("--folder", help="where the images are, or are made; default: a temporary one")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        contender, where = options.measure
        MEASURED[contender](where)
        return
    with tempfile.TemporaryDirectory(prefix="gmdist-bench-") as scratch:
        folder = Path(options.folder or scratch)
        if not (folder / "count").exists():
            photographs(folder)
        server = None
        if options.s3:
            script = str(HERE.parent / "tests/s3/server.py")
            server = subprocess.Popen([options.s3, script], stdout=subprocess.PIPE, text=True)
        try:
            settings = [word for _ in range(2) for word in server.stdout.readline().split()] if server else []
            compare(folder, options.peers, dict(setting.split("=", 1) for setting in settings))
        finally:
            if server:
                server.terminate()
                server.wait()


def compare(folder: Path, peers: str | None, s3: dict[str, str]) -> None:
    """Run the contenders in turn."""
    os.environ.update(s3 | {"OMP_NUM_THREADS": "1"})
    remote = "s3://images/photographs"
    commands = {name: [sys.executable, __file__, "--measure", name, str(folder)] for name in ("decode", "local")}
    if s3:
        upload(folder, remote)
        commands["s3"] = [sys.executable, __file__, "--measure", "s3", remote]
    if peers:
        commands |= {name: [peers, str(HERE / "loader_peers.py"), name, str(folder)] for name in PEERS}
    figures: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            figure = figures_of(name, command)
            for clock in ("wall", "cpu"):
                figures[name][clock].append(figure["samples"] / figure[f"{clock}_s"])
    medians = {
        name: {clock: statistics.median(rates) for clock, rates in both.items()} for name, both in figures.items()
    }
    print(f"{'':24s}{'samples/s':>12s}{'samples/CPU-s':>15s}")
    for name, both in medians.items():
        print(f"{name:24s}{both['wall']:12.0f}{both['cpu']:15.0f}")
    for clock, mine, theirs, wanted in TARGETS:
        if mine in medians and theirs in medians:
            ratio = medians[mine][clock] / medians[theirs][clock]
            unit = "samples/CPU-s" if clock == "cpu" else "samples/s"
            tell(f"{mine} / {theirs}, {unit}", ratio, wanted, ratio >= wanted)
    if s3:
        worst = figures_of("resume", [sys.executable, __file__, "--measure", "resume", remote])
        tell(
            f"resume from S3, the worst of 12 places: first batch after s ({worst['requests']:.0f} requests)",
            worst["s"],
            1.0,
        )
        tell("read until then, parts of 8 MiB", worst["bytes"] / (8 << 20), 3.0)
    large = figures_of("scale", [sys.executable, __file__, "--measure", "scale", ""])
    tell("a manifest of 1,000,000 shards opens, s", large["open_s"], 2.0)
    tell("the same, MB", large["mb"], 200.0)
    tell("locating any of 10^9 samples, 16,384 at once, microseconds each", large["locate_16384_us"], 20.0)
    tell("the same, 64 at once", large["locate_64_us"], 20.0)
    print(f"the orders of 1,024 workers, woven together, are the one order: {'ok' if large['one_order'] else 'NO'}")


def figures_of(name: str, command: list[str]) -> dict[str, Any]:
    """The figures that a contender prints."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{name}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.strip().splitlines()[-1])


def tell(what: str, value: float, wanted: float, holds: bool | None = None) -> None:
    """Print a figure beside what is asked for: at most so much, unless `holds` says it."""
    word = "at most" if holds is None else "at least"
    holds = value <= wanted if holds is None else holds
    print(f"{what}: {value:.2f} ({word} {wanted:g}) {'ok' if holds else 'SHORT'}")


def upload(folder: Path, remote: str) -> None:
    """Copy the data set to the S3 server."""
    from gmdist import s3, storage
    from gmdist.data.index import index_folder

    s3.client().create_bucket(Bucket="images")
    for path in sorted(folder.glob("*.tar")):
        storage.copy_from_local(str(path), f"{remote}/{path.name}")
    index_folder(remote)


if __name__ == "__main__":
    main()
