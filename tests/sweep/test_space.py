"""Domains: what they give, and what is refused."""

import random
from typing import Any

import pytest

from gmdist.errors import ConfigError
from gmdist.sweep.space import Domain, parse_space


def test_values_are_of_their_domains() -> None:
    source = random.Random(0)
    for _ in range(300):
        assert 1e-4 <= Domain("log_uniform", (1e-4, 1e-2)).draw(source) <= 1e-2
        assert -1.0 <= Domain("uniform", (-1.0, 2.0)).draw(source) <= 2.0
        assert Domain("integer", (3, 5)).draw(source) in (3, 4, 5)
        assert Domain("choice", ("a", None)).draw(source) in ("a", None)


def test_log_uniform_has_as_many_in_each_decade() -> None:
    domain, source = Domain("log_uniform", (1e-4, 1e-1)), random.Random(1)
    drawn = [domain.draw(source) for _ in range(3000)]
    for low in (1e-4, 1e-3, 1e-2):
        assert 900 < sum(low <= value < 10 * low for value in drawn) < 1100


def test_a_near_value_is_a_fifth_off_and_within() -> None:
    source = random.Random(0)
    domain = Domain("uniform", (0.0, 1.0))
    assert {round(domain.near(0.5, source), 6) for _ in range(50)} == {0.4, 0.6}
    assert {round(domain.near(0.9, source), 6) for _ in range(50)} == {0.72, 1.0}
    assert {domain.near(1.0, source) for _ in range(50)} == {0.8}  # another, at an end too
    assert {domain.near(0.0, source) for _ in range(50)} == {0.2}
    assert {Domain("uniform", (-1.0, 1.0)).near(0.0, source) for _ in range(50)} == {-0.4, 0.4}
    assert {Domain("choice", ("a", "b", "c")).near("b", source) for _ in range(50)} == {"a", "c"}
    assert {Domain("choice", ("a", "b", "c")).near("c", source) for _ in range(50)} == {"b"}
    assert Domain("grid", ("a",)).near("a", source) == "a"
    assert {Domain("integer", (1, 20)).near(10, source) for _ in range(50)} == {8, 12}
    assert {Domain("integer", (1, 20)).near(2, source) for _ in range(50)} == {1, 3}
    assert {Domain("integer", (-20, 20)).near(0, source) for _ in range(50)} == {-1, 1}


def test_nested_keys_are_dotted_ones_and_later_ones_count() -> None:
    space = {"optim.vae.lr": {"choice": [1.0]}, "optim": {"vae": {"lr": {"grid": [2.0]}}}}
    assert parse_space(space) == {"optim.vae.lr": Domain("grid", (2.0,))}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space: empty"),
        ({"a.b": {"choice": []}}, "sweep.space.a.b.choice: [[][]]; must have at least one value"),
        ({"a.b": {"choice": 3}}, "sweep.space.a.b.choice: 3; must be a list"),
        ({"a.b": {"choice": [1, 1]}}, "has a value twice"),
        ({"a.b": {"normal": [0, 1]}}, "must be one of uniform, log_uniform, integer, choice, grid"),
        ({"a.b": [1, 2]}, "must be one of uniform"),
        ({"a.b": {"uniform": [1.0]}}, "must be two numbers, the smaller first"),
        ({"a.b": {"uniform": [2, 1]}}, "must be two numbers, the smaller first"),
        ({"a.b": {"uniform": [0.0, float("inf")]}}, "must be two numbers"),
        ({"a.b": {"uniform": [True, 2]}}, "must be two numbers"),
        ({"a.b": {"log_uniform": [0, 1]}}, "must be above 0"),
        ({"a.b": {"integer": [0.5, 2]}}, "must be two integers"),
        ({"a": {"choice": [1]}, "a.b": {"choice": [1]}}, "is a part of 'a'"),
    ],
)
def test_what_is_no_space_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(space)
