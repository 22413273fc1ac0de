"""Our loader beside its peers on the same 10,000 photographs of 256x256 (JPEG, 15 KB), in turn, in one process tree.

    make bench-loader

Every contender reads, decodes and batches one epoch after an epoch that warmed its caches, in a process of its own.
Printed are samples a second and samples a CPU-second (of the process and its children), the medians of some rounds, and
the ratios that are asked for. The S3 server is OpenStack Swift on loopback: its own CPU time is not counted.
"""

import argparse
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def decode_alone(folder: str) -> int:
    """Decode images that are in memory, in as many threads."""
    import simplejpeg

    from gmdist.data.fetch import Shards
    from gmdist.data.manifest import Manifest

    global _contents
    if not _contents:
        shards = Shards(folder, Manifest.load(folder))
        places = [(s, i) for s, shard in enumerate(shards.manifest.shards) for i in range(shard.samples)]
        _contents = [bytes(shards.read(*place)[1]["jpg"]) for place in places]

    def decode(first: int) -> int:
        return sum(len(simplejpeg.decode_jpeg(content)) > 0 for content in _contents[first : first + 16])

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(decode, range(0, len(_contents), 16)))


_contents: list[bytes] = []


def ours(folder: str) -> int:
    """One epoch of our loader."""
    from gmdist.data.loader import DataConfig, Loader

    loader = Loader(DataConfig(folder, BATCH, 256, num_classes=10, num_threads=THREADS), folder)
    batches, count = loader.batches(0), 0
    while count < loader.num_samples - BATCH:
        count += len(next(batches).tensors["label"])
    batches.close()
    return count


def measure(contender: str, folder: str) -> None:
    """Run one of our own contenders in this process, and print its figures."""
    run = decode_alone if contender == "decode" else ours
    gc.freeze()  # as a worker does
    figures = {}
    for _ in range(2):
        began_s, began_cpu_s = time.perf_counter(), cpu_s()
        count = run(folder)
        figures = {"samples": count, "wall_s": time.perf_counter() - began_s, "cpu_s": cpu_s() - began_cpu_s}
    print(json.dumps(figures))


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python that has the peers; without it only ours are measured")
    parser.add_argument("--s3", help="the Python that has OpenStack Swift; without it nothing is read from S3")
    parser.add_argument("--folder", help="where the images are, or are made; default: a temporary one")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
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
    commands = {name: [sys.executable, __file__, "--measure", name, str(folder)] for name in ("decode", "local")}
    if s3:
        upload(folder)
        commands["s3"] = [sys.executable, __file__, "--measure", "s3", "s3://images/photographs"]
    if peers:
        commands |= {name: [peers, str(HERE / "loader_peers.py"), name, str(folder)] for name in PEERS}
    figures: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.exit(f"{name}: {ended.stderr[-2000:]}")
            figure = json.loads(ended.stdout.strip().splitlines()[-1])
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
            print(f"{mine} / {theirs}, {unit}: {ratio:.2f} (at least {wanted}) {'ok' if ratio >= wanted else 'SHORT'}")


def upload(folder: Path) -> None:
    """Copy the data set to the S3 server."""
    from gmdist import s3, storage
    from gmdist.data.index import index_folder

    s3.client().create_bucket(Bucket="images")
    for path in sorted(folder.glob("*.tar")):
        storage.copy_from_local(str(path), f"s3://images/photographs/{path.name}")
    index_folder("s3://images/photographs")


if __name__ == "__main__":
    main()
