"""What this machine has for gmdist, and what is missing."""

import importlib.metadata
import os
import platform
import re
import shutil

_SHM = "/dev/shm"  # noqa: S108 - where Ray keeps objects
_LOW_SHM_BYTES = 1 << 30


def examine() -> tuple[list[str], bool]:
    """One line for each thing looked at, and whether gmdist can train here."""
    lines = [f"ok       Python {platform.python_version()}, {os.cpu_count()} CPUs"]
    sound = True
    for name in _required():
        try:
            lines.append(f"ok       {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"MISSING  {name}; run `make setup`")
            sound = False
    lines.append(_accelerator())
    if os.path.isdir(_SHM):
        free = shutil.disk_usage(_SHM).free
        enough = free >= _LOW_SHM_BYTES
        lines.append(
            f"{'ok ' if enough else 'LOW'}      /dev/shm has {free / 2**30:.1f} GiB free; Ray keeps objects there"
        )
    free = shutil.disk_usage(".").free
    lines.append(f"ok       {free / 2**30:.0f} GiB free in this folder")
    return lines, sound


def _required() -> list[str]:
    """The packages that gmdist's own metadata asks for, but those of its extras."""
    try:
        lines = importlib.metadata.requires("gmdist") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ["gmdist"]
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "MISSING  torch; run `make setup`"
    if not torch.cuda.is_available():
        return "ok       no GPU: training runs on CPUs"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"ok       {torch.cuda.device_count()} GPUs ({names}); set cluster.gpus_per_worker=1"
