"""The tensors of safetensors files that others wrote, checked as they are read."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmdist.errors import ConfigError

_DTYPES = ("F16", "BF16", "F32", "F64")


def open_file(path: Path, stack: ExitStack) -> Any:
    """A safetensors file, until the stack closes it; ConfigError where it is none."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a sound safetensors file ({error})") from error


def read_tensor(opened: Any, key: str, where: Path) -> Tensor:
    """A tensor of an opened file, in fp32; ConfigError where it cannot be read or is not finite."""
    try:
        tensor: Tensor = opened.get_tensor(key).to(torch.float32)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {key} cannot be read ({error})") from error
    if not tensor.isfinite().all():
        raise ConfigError(f"{where}: {key} has values that are not finite in fp32")
    return tensor


def check_dtypes(dtypes: Mapping[str, str], where: Path) -> None:
    """ConfigError for a tensor that is not of floating point."""
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ConfigError(f"{where}: {name} is {dtype}; must be one of {', '.join(_DTYPES)}")


def shape_problems(found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> list[str]:
    """What names the tensors that are missing, those that are not known, and those of another shape."""
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        problems.append(f"{len(unknown)} not known: {', '.join(unknown)}")
    common = sorted(found.keys() & wanted.keys())
    wrong = [f"{name} {found[name]} for {wanted[name]}" for name in common if list(found[name]) != wanted[name]]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {', '.join(wrong)}")
    return problems
