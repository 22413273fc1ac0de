"""Which values a new trial has."""

import itertools
from typing import Any

from gmdist.sweep.space import Domain
from gmdist.sweep.trials import History, Plan


def settings_of(plan: Plan, trial: int, history: History) -> dict[str, Any]:
    """The values of a trial's keys: a function of the plan, the trial's number and, for TPE, of what was found."""
    if plan.sweep.search == "tpe":
        return _tpe(plan, trial, history)
    in_turn = [key for key, domain in plan.domains.items() if plan.sweep.search == "grid" or domain.kind == "grid"]
    points = itertools.product(*(plan.domains[key].values for key in in_turn))
    point = next(itertools.islice(points, trial % plan.sweep.grid_size, None))
    settings = dict(zip(in_turn, point, strict=True))
    # Each key has numbers of its own: a key that is added leaves the values of the others as they were.
    return {
        key: settings[key] if key in settings else domain.draw(plan.source(key, trial))
        for key, domain in plan.domains.items()
    }


def _tpe(plan: Plan, trial: int, history: History) -> dict[str, Any]:
    """Values where Optuna's tree-structured Parzen estimator expects good ones (Bergstra 2011; Watanabe 2023).

    The study is made anew from the history: a sweep that goes on asks what one that was left alone asks.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        seed=plan.source("tpe", trial).getrandbits(32), multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler, direction="minimize" if plan.sweep.mode == "min" else "maximize")
    distributions = {key: _distribution(domain) for key, domain in plan.domains.items()}
    for number in range(trial):
        study.add_trial(_as_optunas(plan, number, history, distributions))
    asked = study.ask(distributions)
    return {key: _decoded(domain, asked.params[key]) for key, domain in plan.domains.items()}


def _as_optunas(plan: Plan, number: int, history: History, distributions: dict[str, Any]) -> Any:
    """A trial as Optuna knows it. One that has not come to its end counts by how far it came, and how good it was."""
    from optuna.trial import TrialState, create_trial

    settings = next(stretch.settings for stretch in history.begun if stretch.trial == number)
    found = {one.stretch.last_step: one.result.metric for one in history.of(number) if one.result.metric is not None}
    has_ended = plan.stops[-1] in found
    state = TrialState.COMPLETE if has_ended else TrialState.PRUNED
    if not found:
        is_running = any(stretch.trial == number for stretch in history.running)
        state = TrialState.RUNNING if is_running else TrialState.FAIL
    return create_trial(
        state=state,
        value=found[plan.stops[-1]] if has_ended else None,
        params={key: _encoded(domain, settings[key]) for key, domain in plan.domains.items()},
        distributions=distributions,
        intermediate_values=found,
    )


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.is_list:  # by their places: values may be lists, which Optuna does not take
        return CategoricalDistribution(range(len(domain.values)))
    low, high = domain.values
    if domain.kind == "integer":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=domain.kind == "log_uniform")


def _encoded(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if domain.is_list else value


def _decoded(domain: Domain, value: Any) -> Any:
    return domain.values[value] if domain.is_list else value
