"""What is trained next: a pure function of what has been found out, so that a sweep can go on where it was killed."""

from gmdist.sweep.search import settings_of
from gmdist.sweep.trials import Finished, History, Plan, Stretch, best_first


def next_stretch(plan: Plan, history: History) -> Stretch | None:
    """What to train next; None if that depends on what is under way, or if the sweep has come to its end."""
    if plan.sweep.scheduler.name == "asha":
        return _asha(plan, history)
    if plan.sweep.scheduler.name == "pbt":
        return _pbt(plan, history)
    return _new_trial(plan, history)


def run_name(trial: int, number: int = 0) -> str:
    """The folder of a trial's run; of one that went on from another trial's in its stretch of that number."""
    return f"{trial:03d}-{number}" if number else f"{trial:03d}"


def _new_trial(plan: Plan, history: History) -> Stretch | None:
    trial = len({stretch.trial for stretch in history.begun})
    if trial == plan.sweep.trials:
        return None
    return Stretch(trial, 0, 0, plan.stops[0], settings_of(plan, trial, history), run_name(trial))


def _following(plan: Plan, before: Stretch) -> Stretch:
    """The next stretch of a trial."""
    number = before.number + 1
    return Stretch(before.trial, number, before.last_step, plan.stops[number], before.settings, before.run)


def _asha(plan: Plan, history: History) -> Stretch | None:
    """Asynchronous successive halving (Li 2018, Algorithm 2): what can go on does, the furthest first."""
    ended: list[list[Finished]] = [[] for _ in plan.stops]  # by comparison
    for one in history.finished:
        ended[one.stretch.number].append(one)
    begun = [{stretch.trial for stretch in history.begun if stretch.number == number} for number in range(len(ended))]
    waiting = [  # by comparison, too: those that have not gone on, the best first
        [one for one in best_first(plan, ended[number]) if one.stretch.trial not in begun[number + 1]]
        for number in range(len(ended) - 1)
    ]
    for number in reversed(range(len(waiting))):
        for one in best_first(plan, ended[number])[: len(ended[number]) // plan.sweep.scheduler.reduction]:
            if one in waiting[number]:
                return _following(plan, one.stretch)
    new = _new_trial(plan, history)
    if new is not None or history.running or best_first(plan, ended[-1]):
        return new
    # Too few for a share of them to be one: the best of those that came furthest goes on, so that one comes to its end.
    furthest = next((some for some in reversed(waiting) if some), None)
    return None if furthest is None else _following(plan, furthest[0].stretch)


def _pbt(plan: Plan, history: History) -> Stretch | None:
    """Population based training (Jaderberg 2017), in generations: all are compared when all have come as far."""
    new = _new_trial(plan, history)
    if new is not None:
        return new
    last = {stretch.trial: stretch for stretch in sorted(history.begun, key=lambda stretch: stretch.number)}
    number = min(stretch.number for stretch in last.values())
    generation = [one for one in history.finished if one.stretch.number == number]
    if len(generation) < plan.sweep.trials or number + 1 == len(plan.stops):
        return None
    order = best_first(plan, generation)
    if not order:
        return None
    failed = {one.stretch.trial for one in generation if one.result.metric is None}
    share = max(1, int(plan.sweep.trials * plan.sweep.scheduler.quantile))
    best = [one.stretch for one in order[:share]]
    worst = failed | {one.stretch.trial for one in order[max(share, len(order) - share + len(failed)) :]}
    # Those that go on from others come first: then the others' checkpoints are still there.
    trial = min((trial not in worst, trial) for trial, stretch in last.items() if stretch.number == number)[1]
    if trial not in worst:
        return _following(plan, last[trial])
    source = plan.source("pbt", trial, number)
    donor = source.choice(best)
    settings = {}
    for key, domain in plan.domains.items():
        anew = source.random() < plan.sweep.scheduler.resample
        settings[key] = domain.draw(source) if anew else domain.near(donor.settings[key], source)
    following = _following(plan, donor)
    return Stretch(
        trial, number + 1, following.first_step, following.last_step, settings, run_name(trial, number + 1), donor.run
    )
