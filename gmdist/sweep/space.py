"""The search space: what values each key of a config may have."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gmdist.errors import ConfigError

_RANGES = ("uniform", "log_uniform", "integer")
_LISTS = ("choice", "grid")
_FIFTH = 0.2  # of itself, by which PBT changes a number (Jaderberg 2017, Appendix A)


def keyed(*purpose: object) -> random.Random:
    """Random numbers for a purpose: the same for the same."""
    return random.Random("/".join(map(str, purpose)))  # noqa: S311 - no secrets are made of it


@dataclass(frozen=True)
class Domain:
    """The values that one key may have."""

    kind: str  # uniform, log_uniform, integer: between two ends, which belong to it; choice, grid: one of a list
    values: tuple[Any, ...]  # the ends, or the list

    @property
    def is_list(self) -> bool:
        """Whether its values are listed."""
        return self.kind in _LISTS

    def draw(self, source: random.Random) -> Any:
        """A value at random."""
        if self.is_list:
            return self.values[source.randrange(len(self.values))]
        low, high = self.values
        if self.kind == "integer":
            return source.randint(low, high)
        if self.kind == "log_uniform":
            return min(max(math.exp(source.uniform(math.log(low), math.log(high))), low), high)
        return source.uniform(low, high)

    def near(self, value: Any, source: random.Random) -> Any:
        """Another value near one: a number a fifth larger or smaller, or the next in the list, up or down.

        At an end of the range it is the one within; from zero a fifth of the range is gone, as zero has no fifth.
        """
        if self.is_list:
            place = self.values.index(value)
            return source.choice(
                self.values[max(place - 1, 0) : place] + self.values[place + 1 : place + 2] or (value,)
            )
        low, high = self.values
        is_up = value <= low or (value < high and source.choice((True, False)))
        amount = _FIFTH * (abs(value) or high - low)
        if self.kind == "integer":
            amount = max(round(_FIFTH * abs(value)), 1)  # a fifth of a small one is nothing
        return min(max(value + amount if is_up else value - amount, low), high)


def parse_space(space: Mapping[str, Any]) -> dict[str, Domain]:
    """The domains of a `sweep.space`, by dotted key; ConfigError for what is none."""
    domains = dict(_leaves(space, ""))
    if not domains:
        raise ConfigError("sweep.space: empty; name keys to search over, as optim.vae.lr: {log_uniform: [1e-4, 1e-2]}")
    for key in domains:
        for other in domains:
            if other.startswith(f"{key}."):
                raise ConfigError(f"sweep.space.{other}: is a part of '{key}', which is in the space as a whole")
    return domains


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Domain]]:
    """Keys may be dotted or nested: overrides of the command line nest them."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in (*_RANGES, *_LISTS):
            yield key, _parse(f"sweep.space.{key}", *next(iter(value.items())))
        elif isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield from _leaves(value, f"{key}.")
        else:
            kinds = ", ".join((*_RANGES, *_LISTS))
            raise ConfigError(
                f"sweep.space.{key}: {value!r}; must be one of {kinds} with values, as {{choice: [1, 2]}}"
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one: 1 and 1.0 are, and a truth value is no number."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _parse(place: str, kind: str, values: Any) -> Domain:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{place}.{kind}: {values!r}; must be a list")
    values = tuple(values)
    if kind in _LISTS:
        if not values:
            raise ConfigError(f"{place}.{kind}: []; must have at least one value")
        if any(_same(value, other) for value, other in itertools.combinations(values, 2)):
            raise ConfigError(f"{place}.{kind}: {list(values)}; has a value twice")
        return Domain(kind, values)
    number = int if kind == "integer" else (int, float)
    is_sound = len(values) == 2 and all(isinstance(end, number) and not isinstance(end, bool) for end in values)
    if not is_sound or not all(math.isfinite(end) for end in values) or values[0] >= values[1]:
        what = "integers" if kind == "integer" else "numbers"
        raise ConfigError(f"{place}.{kind}: {list(values)}; must be two {what}, the smaller first")
    if kind == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"{place}.log_uniform: {list(values)}; must be above 0")
    return Domain(kind, values if kind == "integer" else tuple(float(end) for end in values))
