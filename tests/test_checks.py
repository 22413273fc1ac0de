"""Checks of settings name the first that cannot be."""

import math

import pytest

from gmdist.checks import at_least, between, nonnegative, one_of


def test_settings_that_can_be_have_no_problem() -> None:
    assert at_least(1, depth=1, channels=64) is None
    assert between(1, 4, depth=1, channels=4) is None
    assert nonnegative(weight=0.0, gamma=1e30) is None
    assert one_of(("hinge", "vanilla"), loss="vanilla") is None


def test_the_first_in_the_order_given_is_named() -> None:
    assert at_least(1, depth=3, channels=0, heads=-1) == "channels: 0; must be at least 1"
    assert between(2, 9, length=1, depth=10) == "length: 1; must be from 2 to 9"
    assert between(2, 9, length=2, depth=10) == "depth: 10; must be from 2 to 9"
    assert nonnegative(weight=1.0, gamma=-0.5, beta=-1.0) == "gamma: -0.5; must be a number of at least 0"
    known = {"hinge": 1, "vanilla": 2}
    assert one_of(known, loss="hinge", kind="other") == "kind: 'other'; must be one of hinge, vanilla"


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_weights_are_finite(value: float) -> None:
    assert nonnegative(weight=value) == f"weight: {value}; must be a number of at least 0"
    assert between(0, 1, share=value) == f"share: {value}; must be from 0 to 1"
