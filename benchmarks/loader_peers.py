"""What the peers of `benchmarks/loader.py` run: one loader over the same images, in their own environment.

Prints one JSON line: samples, wall and CPU seconds of an epoch after a first one that warms caches and starts workers.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BATCH = 64


def cpu_s() -> float:
    """CPU seconds of this process and its workers, which live on from one epoch to the next (Linux)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return usage.ru_utime + usage.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def pil(content: bytes) -> np.ndarray:
    """Decode with Pillow."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def turbo(content: bytes) -> np.ndarray:
    """Decode with simplejpeg."""
    import simplejpeg

    return simplejpeg.decode_jpeg(content)


def webdataset_loader(folder: str, decode: Callable[[bytes], np.ndarray]) -> Iterable[Any]:
    """Stock webdataset under torch's DataLoader."""
    import torch
    import webdataset

    shards = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tar"))
    data = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(decode, int)
        .batched(BATCH)
    )
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True)


def streaming_loader(folder: str) -> Iterable[Any]:
    """MosaicML streaming, from its own format, which is made at the first call."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)  # it is imported, and not used here; it needs another build of torch
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms"].ToTensor = None  # type: ignore[attr-defined]
    import torch
    from streaming import MDSWriter, StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return turbo(sample["jpg"]), sample["cls"]

    made = os.path.join(folder, "mds")
    if not os.path.exists(made):
        with MDSWriter(out=made, columns={"jpg": "bytes", "cls": "int"}, size_limit=8 << 20) as writer:
            for name in sorted(os.listdir(folder)):
                for sample in samples_in(os.path.join(folder, name)) if name.endswith(".tar") else ():
                    writer.write(sample)
    return torch.utils.data.DataLoader(
        Images(local=made, shuffle=True, batch_size=BATCH), batch_size=BATCH, num_workers=2, persistent_workers=True
    )


def litdata_loader(folder: str) -> Iterable[Any]:
    """litdata, from its own format, which is made at the first call."""
    import litdata

    made = os.path.join(folder, "litdata")
    if not os.path.exists(made):
        shards = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".tar")]
        litdata.optimize(fn=samples_in, inputs=shards, output_dir=made, chunk_bytes="8MB", num_workers=1)

    data = litdata.StreamingDataset(made, shuffle=True, transform=decoded)
    return litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=2, persistent_workers=True)


def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Image and label of a sample of litdata's."""
    return turbo(sample["jpg"]), sample["cls"]


def samples_in(shard: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar shard."""
    import webdataset

    for sample in webdataset.WebDataset(shard, shardshuffle=False):
        yield {"jpg": sample["jpg"], "cls": int(sample["cls"])}


LOADERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "webdataset-pil": lambda folder: webdataset_loader(folder, pil),
    "webdataset-simplejpeg": lambda folder: webdataset_loader(folder, turbo),
    "streaming": streaming_loader,
    "litdata": litdata_loader,
}


def main() -> None:
    """Run one loader for two epochs, and print the figures of the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("folder")
    options = parser.parse_args()
    loader = LOADERS[options.loader](options.folder)
    figures = []
    for _ in range(2):
        began_s, began_cpu_s, count = time.perf_counter(), cpu_s(), 0
        for images, _labels in loader:
            count += len(images)
        figures.append({"samples": count, "wall_s": time.perf_counter() - began_s, "cpu_s": cpu_s() - began_cpu_s})
    print(json.dumps(figures[-1]))


if __name__ == "__main__":
    main()
