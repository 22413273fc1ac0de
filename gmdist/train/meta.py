"""What meta.json says of a checkpoint, and whether a run can have written it.

A right checksum says that the file is as it was written, not by whom: nothing is used before it was looked at here.
"""

import re
from collections.abc import Callable
from typing import Any

FORMAT_VERSION = 3

_Check = Callable[[Any], bool]


def shard_name(rank: int, world_size: int) -> str:
    """The name of a worker's shard."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def _a(kind: type) -> _Check:
    return lambda value: type(value) is kind


def _list_of(check: _Check) -> _Check:
    return lambda value: type(value) is list and all(map(check, value))


def _by_name(check: _Check) -> _Check:
    return lambda value: type(value) is dict and all(map(check, value.values()))


def _record(fields: dict[str, _Check]) -> _Check:
    return lambda value: (
        type(value) is dict and all(name in value and fits(value[name]) for name, fits in fields.items())
    )


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _pair_of(check: _Check) -> _Check:
    return lambda value: type(value) is list and len(value) == 2 and all(map(check, value))


def _digest(value: Any) -> bool:
    return type(value) is str and re.fullmatch("[0-9a-f]{16}", value) is not None


def _shards(value: Any) -> bool:
    """Whether these are the shards of a job, one a worker: no other name is ever opened."""
    if not _list_of(_record({"name": _a(str), "bytes": _count, "crc32": _count}))(value):
        return False
    names = [shard["name"] for shard in value]
    return len(names) > 0 and names == [shard_name(i, len(names)) for i in range(len(names))]


_FIELDS: dict[str, _Check] = {
    "step": _count,
    "family": _a(str),
    "images": _count,  # seen
    "cursor": _count,  # the next sample's number
    "left_out": _list_of(_pair_of(_count)),  # numbers of samples: first, last + 1
    "skips": _record({"total": _count, "in_a_row": _count, "since": _count}),
    "averages": _list_of(_by_name(_pair_of(_a(float)))),  # of each worker: sum and weight by name
    "flops": _by_name(_a(float)),  # of a sample, by phase
    "batch_size": _count,
    "order_digest": _digest,
    "evaluation": _by_name(_a(float)),
    "data": _a(dict),  # the order's fingerprint, which checks itself
    "train_seed": _a(int),
    "world_size": _count,
    "updates": lambda value: _by_name(_count)(value) and len(value) > 0,  # of each trained child
    "shapes": _by_name(_list_of(_count)),  # of parameters and buffers
    "worker_shapes": _by_name(_list_of(_count)),
    "shards": _shards,
}


def problem_with(meta: dict[str, Any], step: int | None) -> str | None:
    """What is wrong with the meta.json of a step's checkpoint; None if nothing is."""
    if meta.get("format") != FORMAT_VERSION:
        return f"format {meta.get('format')}; this version of gmdist reads {FORMAT_VERSION}"
    for name, fits in _FIELDS.items():
        if name not in meta:
            return f"damaged (it has no '{name}')"
        if not fits(meta[name]):
            return f"damaged (its '{name}' is nothing that a run writes)"
    if meta["step"] != step:
        return f"of step {meta['step']}, in the folder of another"
    return None
