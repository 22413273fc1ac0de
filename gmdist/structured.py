"""Plain values to dataclasses and back. Every error names the key, the value, and what would be valid."""

import dataclasses
import difflib
from types import UnionType
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gmdist.errors import ConfigError

_NOUNS = {int: "integers", float: "numbers", str: "texts"}


def structured(kind: type, values: Any, prefix: str) -> Any:
    """An instance of a dataclass from plain values; unknown keys, wrong types and missing values are refused."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix}: {values!r}; must be a mapping of keys to values")
    _refuse_unknown_fields(kind, values, prefix)
    try:
        node = OmegaConf.merge(OmegaConf.structured(kind), values)
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(f"{prefix}.{missing[0]}: missing")
        return _tupled(OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        key = f"{prefix}.{error.full_key}" if error.full_key else prefix
        reason = str(error).splitlines()[0].rstrip(".")
        if not error.full_key:  # OmegaConf does not say of which key: what it quotes is all there is
            reason += f" in {values}"
        raise ConfigError(f"{key}: {reason}") from error


def _refuse_unknown_fields(kind: type, values: dict[str, Any], prefix: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    refuse_unknown(values, list(fields), prefix)
    for key, value in values.items():
        inner = fields[str(key)].type
        is_text = inner is str or (get_origin(inner) is UnionType and str in get_args(inner))
        if is_text and value is not None and not isinstance(value, str | list | dict):
            kind_of = "true or false" if isinstance(value, bool) else "a number"
            raise ConfigError(f"{prefix}.{key}: {value}; YAML reads it as {kind_of}: put it in quotes, as '\"...\"'")
        _refuse_items(kind, inner, value, str(key), prefix)
        named = {f"{prefix}.{key}": value}
        if get_origin(inner) is dict and value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}.{key}: {value!r}; must be a mapping of names to settings")
            inner = get_args(inner)[1]
            named = {f"{prefix}.{key}.{name}": item for name, item in value.items()}
        for place, item in named.items():
            inner = next((part for part in get_args(inner) if part is not type(None)), inner)  # of "X | None"
            if not isinstance(inner, type) or not dataclasses.is_dataclass(inner) or item is None:
                continue
            if not isinstance(item, dict):
                raise ConfigError(f"{place}: {item!r}; must be a mapping of keys to values")
            _refuse_unknown_fields(inner, item, place)


def _refuse_items(kind: type, declared: Any, value: Any, key: str, prefix: str) -> None:
    """Refuse what is no list, or has items of another type than a field's: OmegaConf names neither key nor value."""
    declared = next((part for part in (declared, *get_args(declared)) if get_origin(part) is tuple), None)
    if declared is None or value is None:
        return
    items = get_args(declared)
    count = "" if Ellipsis in items else f"{len(items)} "
    refusal = ConfigError(f"{prefix}.{key}: {value}; must be a list of {count}{_NOUNS[items[0]]}")
    # OmegaConf lets items of lists and mappings pass, and refuses what is no list without a word of either.
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        raise refusal
    try:
        OmegaConf.merge(OmegaConf.structured(kind), {key: value})
    except OmegaConfBaseException as error:
        raise refusal from error


def refuse_unknown(values: dict[str, Any], known: list[str], prefix: str) -> None:
    """Refuse a key that is none of the known ones, and name the one that was meant."""
    for key in values:
        if key not in known:
            dotted = f"{prefix}.{key}" if prefix else str(key)
            raise ConfigError(f"{dotted}: no such key{_suggest(str(key), known)}")


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    # "lrate" and "lr" are not close by letters in common, but one begins with the other.
    close = close or [name for name in known if key.startswith(name) or name.startswith(key)][:1]
    return f"; did you mean '{close[0]}'?" if close else f"; the keys here are {', '.join(known)}"


def _tupled(value: Any) -> Any:
    """OmegaConf turns tuples into lists: turn them back, as the dataclasses say."""
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            _tupled(item)
        elif isinstance(item, list):
            object.__setattr__(value, f.name, tuple(item))
    return value


def plain(value: Any) -> Any:
    """A dataclass as plain values, for YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
