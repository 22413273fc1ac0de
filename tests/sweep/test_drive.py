"""Whole sweeps without training: which trials go how far, and the same after every kill."""

import random
from collections import Counter

import pytest
from plans import at_once, found, plan_of

from gmdist.sweep.drive import drive
from gmdist.sweep.trials import Finished, Plan, Result, Stretch

ASHA = {"num_trials": 12, "scheduler_name": "asha", "scheduler_first_step": 10}
PBT = {"num_trials": 8, "scheduler_name": "pbt", "scheduler_interval_steps": 30}
PLANS = {
    "none": plan_of(num_trials=5),
    "asha": plan_of(**ASHA),
    "asha with tpe": plan_of(**ASHA, search="tpe"),
    "pbt": plan_of(**PBT),
}


class Killed(BaseException):
    """The command was killed."""


def test_without_a_scheduler_each_trial_trains_once_to_its_end() -> None:
    ended = drive(PLANS["none"], 2, at_once())
    assert sorted((one.stretch.trial, one.stretch.first_step, one.stretch.last_step) for one in ended) == [
        (trial, 0, 90) for trial in range(5)
    ]


def test_asha_takes_a_third_further_each_time_and_saves_most_steps() -> None:
    ended = drive(PLANS["asha"], 1, at_once())
    counts = Counter(one.stretch.last_step for one in ended)
    assert counts[10] == 12
    assert 4 <= counts[30] <= 6
    assert 1 <= counts[90] <= 2
    assert sum(one.stretch.num_steps for one in ended) < 0.4 * 12 * 90
    at_first = sorted((one for one in ended if one.stretch.last_step == 10), key=lambda one: one.result.metric or 0.0)
    best = at_first[0].stretch.trial
    assert any(one.stretch.trial == best and one.stretch.last_step == 90 for one in ended)


def test_a_trial_goes_on_where_it_paused() -> None:
    for name in ("asha", "pbt"):
        ended = drive(PLANS[name], 3, at_once())
        for one in ended:
            if one.stretch.number:
                before = [other for other in ended if other.stretch.last_step == one.stretch.first_step]
                assert any(other.stretch.run == (one.stretch.donor or one.stretch.run) for other in before)


def test_asha_with_few_trials_takes_the_best_to_its_end() -> None:
    ended = drive(plan_of(num_trials=2, scheduler_name="asha", scheduler_first_step=10), 1, at_once())
    assert [one.stretch.last_step for one in ended] == [10, 10, 30, 90]
    assert len({one.stretch.trial for one in ended[2:]}) == 1


def test_a_larger_metric_is_better_where_the_sweep_says_so() -> None:
    plan = plan_of(**ASHA, mode="max")
    ended = drive(plan, 1, at_once(lambda stretch: Result(-(found(stretch).metric or 0.0))))
    others = drive(PLANS["asha"], 1, at_once())
    assert [one.stretch for one in ended] == [one.stretch for one in others]


def test_failed_trials_go_no_further_and_end_nothing() -> None:
    def measure(stretch: Stretch) -> Result:
        return Result(None, "diverged") if stretch.trial % 2 else found(stretch)

    for name, plan in PLANS.items():
        ended = drive(plan, 2, at_once(measure))
        failed = [one for one in ended if one.stretch.trial % 2]
        assert {one.stretch.trial for one in ended} == set(range(plan.sweep.trials)), name
        if name != "pbt":
            assert all(one.stretch.number == 0 for one in failed), name
        assert any(one.stretch.last_step == 90 and one.result.metric is not None for one in ended), name


def test_all_failing_ends_the_sweep() -> None:
    for plan in PLANS.values():
        ended = drive(plan, 2, at_once(lambda stretch: Result(None, "diverged")))
        assert len(ended) == plan.sweep.trials


def test_the_worst_of_a_population_go_on_from_the_best_with_other_values() -> None:
    ended = drive(PLANS["pbt"], 2, at_once())
    assert Counter(one.stretch.number for one in ended) == {0: 8, 1: 8, 2: 8}
    for number in (1, 2):
        before = [one for one in ended if one.stretch.number == number - 1]
        order = [one.stretch.run for one in sorted(before, key=lambda one: one.result.metric or 0.0)]
        moved = [one.stretch for one in ended if one.stretch.number == number and one.stretch.donor is not None]
        assert len(moved) == 2
        for stretch in moved:
            assert stretch.donor in order[:2]
            assert stretch.run == f"{stretch.trial:03d}-{number}"
            own = next(one.stretch for one in before if one.stretch.trial == stretch.trial)
            assert own.run in order[-2:]
            assert stretch.settings != own.settings


def test_those_that_go_on_from_others_begin_before_others_train_on() -> None:
    begun: list[Stretch] = []

    def start(stretch: Stretch):
        begun.append(stretch)
        return lambda: found(stretch)

    drive(PLANS["pbt"], 1, start)
    for number in (1, 2):
        moved = [stretch.donor is not None for stretch in begun if stretch.number == number]
        assert moved == sorted(moved, reverse=True)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("width", [1, 3])
def test_killed_at_any_moment_a_sweep_ends_the_same(name: str, width: int) -> None:
    plan = PLANS[name]
    alone = drive(plan, width, at_once())
    source = random.Random(name)
    kept: dict[tuple[int, int], Result] = {}
    for _ in range(3):
        with pytest.raises(Killed):
            drive(plan, width, killing(kept, source.randrange(2), source))
    assert kept
    trained: list[Stretch] = []
    ended = drive(plan, width, killing(kept, None, source, trained))
    assert [(one.stretch, one.result) for one in ended] == [(one.stretch, one.result) for one in alone]
    assert not {(stretch.trial, stretch.number) for stretch in trained} & before_last(kept, trained)


def before_last(kept: dict[tuple[int, int], Result], trained: list[Stretch]) -> set[tuple[int, int]]:
    """What was known before the last start."""
    return set(kept) - {(stretch.trial, stretch.number) for stretch in trained}


def killing(
    kept: dict[tuple[int, int], Result], after: int | None, source: random.Random, trained: list[Stretch] | None = None
):
    """What begins stretches, keeps results as they come in any order, and is killed after so many."""
    left = [after]

    def start(stretch: Stretch):
        key = stretch.trial, stretch.number
        if key in kept:
            return lambda: kept[key]
        if trained is not None:
            trained.append(stretch)
        if source.random() < 0.5:  # it was faster than those that count before it
            kept[key] = found(stretch)

        def wait() -> Result:
            if left[0] == 0:
                raise Killed
            if left[0] is not None:
                left[0] -= 1
            kept[key] = found(stretch)
            return kept[key]

        return wait

    return start


def metrics_of(ended: list[Finished]) -> dict[tuple[int, int], float | None]:
    """By trial and stretch."""
    return {(one.stretch.trial, one.stretch.number): one.result.metric for one in ended}


def test_how_many_train_at_once_changes_no_metric_of_a_stretch() -> None:
    one, three = (metrics_of(drive(PLANS["asha"], width, at_once())) for width in (1, 3))
    assert {key: one[key] for key in one.keys() & three.keys()} == {
        key: three[key] for key in one.keys() & three.keys()
    }


def test_plans_are_of_their_settings() -> None:
    assert Plan.of(PLANS["asha"].sweep, 90).stops == (10, 30, 90)
    assert Plan.of(PLANS["pbt"].sweep, 100).stops == (30, 60, 90, 100)
