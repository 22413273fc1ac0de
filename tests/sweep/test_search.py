"""Which values trials have."""

import math

from plans import RANGES, plan_of

from gmdist.sweep.drive import drive
from gmdist.sweep.search import settings_of
from gmdist.sweep.trials import Finished, History, Plan, Result, Stretch


def drawn(plan: Plan, count: int) -> list[dict[str, object]]:
    """The values of the first trials."""
    return [settings_of(plan, trial, History()) for trial in range(count)]


def test_the_same_sweep_draws_the_same_and_another_seed_others() -> None:
    plan = plan_of(num_trials=8)
    assert drawn(plan, 8) == drawn(plan_of(num_trials=8), 8)
    assert drawn(plan, 8) != drawn(plan_of(num_trials=8, seed=1), 8)


def test_a_key_more_leaves_the_values_of_others() -> None:
    more = RANGES | {"train.ema_ramp": {"uniform": [0.0, 1.0]}}
    one, other = drawn(plan_of(num_trials=5), 5), drawn(plan_of(num_trials=5, space=more), 5)
    assert [settings["optim.net.lr"] for settings in one] == [settings["optim.net.lr"] for settings in other]


def test_a_grid_has_every_combination_once() -> None:
    plan = plan_of(space={"a.x": {"grid": [1, 2]}, "a.y": {"choice": ["p", "q", None]}}, search="grid")
    assert plan.sweep.trials == 6
    assert {(one["a.x"], one["a.y"]) for one in drawn(plan, 6)} == {(x, y) for x in (1, 2) for y in ("p", "q", None)}


def test_random_search_goes_through_its_grids() -> None:
    plan = plan_of(space={"a.x": {"grid": [1, 2, 3]}, "a.y": {"uniform": [0.0, 1.0]}}, num_trials=9)
    assert [one["a.x"] for one in drawn(plan, 9)] == [1, 2, 3] * 3
    assert len({one["a.y"] for one in drawn(plan, 9)}) == 9


def test_tpe_comes_nearer_than_chance() -> None:
    def off(stretch: Stretch) -> float:
        return abs(math.log(stretch.settings["optim.net.lr"] / 0.01))

    def distance(search: str, seed: int) -> float:
        plan = plan_of(num_trials=40, search=search, seed=seed)
        ended = drive(plan, 1, lambda stretch: lambda: Result(off(stretch)))
        return sum(off(one.stretch) for one in ended[20:])

    assert sum(distance("tpe", seed) for seed in range(3)) < 0.65 * sum(distance("random", seed) for seed in range(3))


def test_tpe_knows_failed_running_and_unfinished_trials() -> None:
    plan = plan_of(num_trials=9, search="tpe", scheduler_name="asha", scheduler_first_step=10)
    settings = [{"optim.net.lr": 0.001 * (i + 1), "family.width": 8} for i in range(3)]
    stretches = [Stretch(i, 0, 0, 10, settings[i], f"{i:03d}") for i in range(3)]
    finished = [Finished(stretches[0], Result(1.0)), Finished(stretches[1], Result(None, "failed"))]
    asked = settings_of(plan, 3, History(finished, stretches[2:]))
    assert set(asked) == set(RANGES)
    assert asked["family.width"] in (8, 16, 32)
