"""Checks of settings, by key: the first that cannot be, as "key: value; what is valid", or None if all can."""

import math
from collections.abc import Collection


def at_least(least: int, /, **values: int) -> str | None:
    """Of whole numbers."""
    for key, value in values.items():
        if value < least:
            return f"{key}: {value}; must be at least {least}"
    return None


def between(low: int, high: int, /, **values: float) -> str | None:
    """Of numbers from `low` to `high`, both of which can be."""
    for key, value in values.items():
        if not low <= value <= high:
            return f"{key}: {value}; must be from {low} to {high}"
    return None


def nonnegative(**values: float) -> str | None:
    """Of numbers that are neither below 0 nor infinite, nor "not a number"."""
    for key, value in values.items():
        if not 0.0 <= value < math.inf:
            return f"{key}: {value}; must be a number of at least 0"
    return None


def one_of(known: Collection[str], /, **values: str) -> str | None:
    """Of names."""
    for key, value in values.items():
        if value not in known:
            return f"{key}: '{value}'; must be one of {', '.join(known)}"
    return None
