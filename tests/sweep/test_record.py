"""What sweep.json says of a sweep in the end."""

from pathlib import Path

from plans import found, plan_of

from gmdist.sweep.drive import drive
from gmdist.sweep.record import Record
from gmdist.sweep.trials import Result, Stretch


def test_a_trial_that_was_refused_has_made_no_steps_and_saved_none(tmp_path: Path) -> None:
    plan = plan_of(num_trials=3)

    def begin(stretch: Stretch):
        return lambda: Result(None, "family.width: 8; must be another") if stretch.trial == 1 else found(stretch)

    summary = Record(str(tmp_path), {}, 1).summarize(plan, drive(plan, 1, begin))
    assert [trial["step"] for trial in summary["trials"]] == [90, 0, 90]
    assert [trial["state"] for trial in summary["trials"]] == ["done", "failed", "done"]
    assert (summary["steps"], summary["steps_of_all"]) == (180, 180)
