"""Several data sets in one order: exact shares, each data set's own order kept, lanes that workers do not share."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmdist.data import tape
from gmdist.data.mix import Fingerprint, Mix
from gmdist.errors import DataError

weights_of = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(weights=weights_of, seed=st.integers(0, 2**40), lanes=st.integers(1, 300))
@settings(deadline=None)
def test_every_period_has_exact_shares(weights, seed, lanes) -> None:
    period, periods = sum(weights), 40
    sources, _ = Mix(weights, seed=seed, lanes=lanes).split(np.arange(period * periods))
    for part in sources.reshape(periods, period):
        assert np.bincount(part, minlength=len(weights)).tolist() == weights


@given(weights=weights_of, seed=st.integers(0, 2**40), lanes=st.integers(1, 300))
@settings(deadline=None)
def test_each_data_set_is_read_in_its_own_order(weights, seed, lanes) -> None:
    sources, own = Mix(weights, seed=seed, lanes=lanes).split(np.arange(sum(weights) * 50))
    for source, weight in enumerate(weights):
        assert own[sources == source].tolist() == list(range(weight * 50))


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=50))
def test_any_numbers_in_any_order(numbers) -> None:
    mix = Mix([5, 2, 1], seed=3, lanes=240)
    together = np.stack(mix.split(np.array(numbers)))
    apart = np.concatenate([np.stack(mix.split(np.array([number]))) for number in numbers], axis=1)
    assert (together == apart).all()


def test_one_data_set_keeps_its_numbers() -> None:
    mix = Mix([7], seed=1, lanes=11)
    sources, own = mix.split(np.arange(100))
    assert (sources == 0).all()
    assert (own == np.arange(100)).all()
    assert mix.lanes == (11,)


def test_only_ratios_count() -> None:
    numbers = np.arange(1000)
    for one, other in zip(*(Mix(w, seed=1, lanes=240).split(numbers) for w in ([3, 1], [75, 25])), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [5, 2, 1], [7, 3]])
@pytest.mark.parametrize("world_size", [2, 3, 8, 24])
def test_a_lane_belongs_to_one_worker(weights, world_size) -> None:
    # So a block of a lane, and what is fetched for it, is read by one worker, as without a mix.
    mix = Mix(weights, seed=0, lanes=240)
    assert sum(mix.lanes) == 240
    numbers = np.arange(240 * 20)
    sources, own = mix.split(numbers)
    for source, lanes in enumerate(mix.lanes):
        here = sources == source
        readers = {(lane, worker) for lane, worker in zip(own[here] % lanes, numbers[here] % world_size, strict=True)}
        assert len(readers) == lanes


def test_the_order_within_periods_is_drawn() -> None:
    sources, _ = Mix([1, 1], seed=0, lanes=240).split(np.arange(240))
    first = int((sources[::2] == 0).sum())
    assert abs(first - 60) < 4 * math.sqrt(30)
    again, _ = Mix([1, 1], seed=1, lanes=240).split(np.arange(240))
    assert (sources != again).any()


def fingerprint(weights, *manifests: str) -> Fingerprint:
    return Fingerprint(weights, tuple(tape.Fingerprint(1, 0, 2, 3, manifest) for manifest in manifests))


def test_a_resume_asks_for_the_same_mix() -> None:
    ours = fingerprint((3, 1), "a", "b")
    ours.check(ours.to_dict())
    with pytest.raises(DataError, match=r"weights of data\.mix were 2:1 when the run was started and are 3:1 now"):
        ours.check(fingerprint((2, 1), "a", "b").to_dict())
    with pytest.raises(DataError, match="weights of data.mix were 1 when"):
        ours.check(fingerprint((1,), "a").to_dict())
    with pytest.raises(DataError, match="data set was c when the run was started and is b now"):
        ours.check(fingerprint((3, 1), "a", "c").to_dict())
    for damaged in ({}, {"weights": [3, 1]}, {"weights": 3, "tapes": []}, {"weights": [3, 1], "tapes": [{}]}):
        with pytest.raises(DataError, match="written by another version"):
            ours.check(damaged)
