"""A sweep's sweep.json: what was asked for, what came of each stretch, and which trial is best."""

from typing import Any

from gmdist import storage
from gmdist.errors import ConfigError, StorageError
from gmdist.sweep.trials import Finished, Plan, Result, Stretch, best_first

FILE_NAME = "sweep.json"
_FORMAT = 1


class Record:
    """The results of a sweep, in its folder."""

    def __init__(self, folder: str, asked: dict[str, Any], width: int) -> None:
        """Open the record that is there, or begin one.

        Args:
            folder: of the sweep.
            asked: the sweep's config; a record of another is refused.
            width: trials at once, where the record does not say.

        Raises:
            ConfigError: the folder holds another sweep.
            StorageError: its record cannot be read.
        """
        self._location = storage.join(folder, FILE_NAME)
        self._content: dict[str, Any] = {"format": _FORMAT, "asked": asked, "width": width, "stretches": []}
        if storage.exists(self._location):
            try:
                self._content = storage.read_json(self._location)
            except ValueError as error:
                raise StorageError(f"{self._location}: is damaged ({error}); choose another run.dir") from error
            other = _difference(asked, self._content.get("asked"))
            if self._content.get("format") != _FORMAT or other is not None:
                raise ConfigError(
                    f"run.dir: {folder}; holds another sweep ({other}); go on with that one's settings, choose another "
                    "folder, or start anew with run.overwrite=true"
                )
        else:
            self._write()

    @property
    def width(self) -> int:
        """Trials at once, as the sweep began."""
        return int(self._content["width"])

    def result_of(self, stretch: Stretch) -> Result | None:
        """What came of a stretch, if it has ended."""
        for line in self._content["stretches"]:
            if (line["trial"], line["number"]) == (stretch.trial, stretch.number):
                if line["settings"] != stretch.settings:
                    raise ConfigError(
                        f"run.dir: {self._location}; trial {stretch.trial} was {line['settings']} and would now be "
                        f"{stretch.settings}: it was begun by another version of gmdist or Optuna; choose another"
                        " folder"
                    )
                return Result(line["metric"], line["error"], line["images_per_s"], line["seconds"])
        return None

    def add(self, stretch: Stretch, result: Result) -> None:
        """Take in what came of a stretch."""
        self._content["stretches"].append({**vars(stretch), **vars(result)})
        self._write()

    def summarize(self, plan: Plan, finished: list[Finished]) -> dict[str, Any]:
        """Write what the sweep found: each trial as it ended, and the best; gives it too."""
        trials = []
        for number in sorted({one.stretch.trial for one in finished}):
            own = [one for one in finished if one.stretch.trial == number]
            last = own[-1]
            state = "failed" if last.result.error else "done" if last.stretch.last_step == plan.stops[-1] else "stopped"
            trials.append(
                {
                    "trial": number,
                    "state": state,
                    "run": last.stretch.run,
                    "settings": last.stretch.settings,
                    "step": last.stretch.first_step if last.result.error else last.stretch.last_step,
                    "metric": last.result.metric,
                    "error": last.result.error,
                    "images_per_s": last.result.images_per_s,
                    "lineage": [
                        {"step": one.stretch.first_step, "run": one.stretch.run, "donor": one.stretch.donor}
                        | {"settings": one.stretch.settings}
                        for one in own
                        if one.stretch.number == 0 or one.stretch.donor is not None
                    ],
                }
            )
        furthest = [one for one in finished if one.stretch.last_step == plan.stops[-1]]
        best = best_first(plan, furthest)[:1]
        failed = {trial["trial"] for trial in trials if trial["state"] == "failed"}
        self._content |= {
            "trials": trials,
            "best": best[0].stretch.trial if best else None,
            # Of those that did not fail: what a failure left undone is no saving.
            "steps": sum(one.stretch.num_steps for one in finished if one.stretch.trial not in failed),
            "steps_of_all": (len(trials) - len(failed)) * plan.stops[-1],
        }
        self._write()
        return self._content

    def _write(self) -> None:
        storage.write_json(self._location, self._content)


def _difference(asked: Any, before: Any, place: str = "") -> str | None:
    """The first place where two trees differ, with both values; None if they do not."""
    if isinstance(asked, dict) and isinstance(before, dict):
        for key in [*asked, *(key for key in before if key not in asked)]:
            found = _difference(asked.get(key), before.get(key), f"{place}.{key}" if place else str(key))
            if found is not None:
                return found
        return None
    return None if asked == before else f"{place}: {before!r} there, {asked!r} here"
