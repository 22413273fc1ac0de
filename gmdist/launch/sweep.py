"""Sweeps on Ray: trials side by side, each an ordinary run, until the search has come to its end."""

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from gmdist import runs, start, storage
from gmdist.config import Config
from gmdist.errors import CheckpointError, ClusterLostError, ConfigError, GmdistError, RunFailedError, StorageError
from gmdist.launch.cluster import connected, room
from gmdist.launch.lease import held
from gmdist.launch.preflight import check_cluster
from gmdist.launch.train import train
from gmdist.launch.watch import Stopper
from gmdist.report.sweep import write_page
from gmdist.sweep.drive import drive
from gmdist.sweep.load import RUNS, Sweep
from gmdist.sweep.record import FILE_NAME, Record
from gmdist.sweep.trials import Result, Stretch
from gmdist.train import checkpoint
from gmdist.train.hooks import Progress
from gmdist.train.metrics import FILE_NAME as METRICS_NAME
from gmdist.train.metrics import read_lines
from gmdist.train.optim import kept

BEST_NAME = "best.yaml"
_BEST_RUN = "best"  # the folder that its run goes to
_WRITTEN = (FILE_NAME, BEST_NAME, "report.html")
_POLL_S = 0.25
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Standing:
    """Where a trial stands, for whoever watches it."""

    stretch: Stretch
    state: str  # starting, training, failed or done
    progress: Progress | None = None
    result: Result | None = None


def sweep(asked: Sweep, on_standing: Callable[[Standing], None], on_message: Callable[[str], None]) -> dict[str, Any]:
    """Take a sweep to its end, going on where it stands; the content of its sweep.json.

    SIGINT and SIGTERM make all trials save a checkpoint and return; a second signal ends the process at once.

    Raises:
        ConfigError, StorageError, ClusterLostError: what a user can mend, and is not one trial's.
        RunFailedError: no trial came to its end.
    """
    _check_start(asked)
    stopper = Stopper(on_message)
    folder = asked.folder
    times = asked.plan.sweep.concurrency or 1
    with (
        stopper.installed(),
        held(folder, on_message, partial(stopper.lose, folder)) as lease,
        connected(asked.base.cluster, times=times),
    ):
        if asked.base.cluster.address != "local":
            check_cluster(asked.base)
        lease.confirm()
        stopper.check()
        if asked.base.run.overwrite:
            _clear(folder)
        width = asked.plan.sweep.concurrency or _width(asked.base)
        record = Record(folder, _description(asked), width)
        if asked.plan.sweep.concurrency not in (None, record.width):
            on_message(f"the sweep began with {record.width} trials at once, and goes on so")
        there = record.width if asked.base.cluster.autoscale else _width(asked.base)  # machines are still to come
        if there < record.width:
            on_message(f"the cluster has room for {there} of the sweep's {record.width} trials at once")
        executor = _Executor(asked, record, min(there, record.width), stopper, on_standing, on_message)
        try:
            finished = drive(asked.plan, record.width, executor.start)
        finally:
            executor.close()
        found = record.summarize(asked.plan, finished)
    if found["best"] is None:
        reason = next((trial["error"] for trial in found["trials"] if trial["error"]), "no trial came to its end")
        raise RunFailedError(f"{folder}: no trial came to its end: {reason}")
    best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    config = asked.config_of(best["settings"], storage.join(folder, _BEST_RUN))
    storage.write(storage.join(folder, BEST_NAME), config.to_yaml().encode())
    write_page(asked.base.name, folder, asked.plan.sweep, found)
    return found


def _check_start(asked: Sweep) -> None:
    """Refuse what every trial would be refused for, and what the scheduler cannot do, before any trial starts.

    Raises:
        ConfigError, DataError, CheckpointError: as `start.check_start`; values of pbt that checkpoints do not outlive;
            a folder that holds something else.
    """
    checked: list[Any] = []
    for config in asked.bases:
        needs = config.data, getattr(config.family, "first_stage", None)
        if needs not in checked:
            start.check_start(config)
            checked.append(needs)
    names = storage.list_names(asked.folder)
    if FILE_NAME not in names and (others := sorted({runs.CONFIG_NAME, "checkpoints"} & set(names))):
        raise ConfigError(f"run.dir: {asked.folder}; holds a run ({others[0]}); choose another folder for the sweep")
    if asked.plan.sweep.scheduler.name == "pbt":
        shapes = [runs.shapes(config) for config in asked.bases]
        if any(others != shapes[0] for others in shapes):
            raise ConfigError(
                "sweep.space: with scheduler 'pbt' a trial goes on from another's checkpoint, and these values change "
                "what a model's tensors are; search over values that do not"
            )
        states = [{name: kept(optim) for name, optim in config.optim.items()} for config in asked.bases]
        if any(others != states[0] for others in states):
            raise ConfigError(
                "sweep.space: with scheduler 'pbt' a trial goes on from another's checkpoint, and these values change "
                "what an optimizer keeps: search over values that do not change its name, or momentum from 0"
            )


def _description(asked: Sweep) -> dict[str, Any]:
    """What makes a sweep the one that it is: not where it runs, or how many trials at once."""
    left_out = ("cluster", "run")
    config = {key: value for key, value in asked.tree.items() if key not in left_out}
    sweep_ = {key: value for key, value in vars(asked.plan.sweep).items() if key not in ("space", "concurrency")}
    sweep_["scheduler"] = vars(asked.plan.sweep.scheduler)
    space = {key: {domain.kind: list(domain.values)} for key, domain in asked.plan.domains.items()}
    workers = asked.base.cluster.worker_range[0]
    return {"config": config, "sweep": sweep_ | {"space": space}, "num_workers": workers}


def _width(config: Config) -> int:
    """Trials that the cluster has room for side by side."""
    return max(1, room(config.cluster) // config.cluster.worker_range[0])


def _clear(folder: str) -> None:
    for name in _WRITTEN:
        storage.delete(storage.join(folder, name))
    for name in (RUNS, _BEST_RUN):
        storage.delete_tree(storage.join(folder, name))


class _Executor:
    """Trains stretches in threads of this process: their workers are Ray's."""

    def __init__(
        self,
        asked: Sweep,
        record: Record,
        width: int,
        stopper: Stopper,
        on_standing: Callable[[Standing], None],
        on_message: Callable[[str], None],
    ) -> None:
        self._asked, self._record, self._stopper = asked, record, stopper
        self._on_standing, self._on_message = on_standing, on_message
        self._pool = ThreadPoolExecutor(width, thread_name_prefix="trial")
        self._lock = threading.Lock()  # of the record
        self._stoppers: list[Stopper] = []

    def start(self, stretch: Stretch) -> Callable[[], Result]:
        """Begin a stretch, unless its result is known."""
        with self._lock:
            known = self._record.result_of(stretch)
        if known is not None:
            self._on_standing(Standing(stretch, "failed" if known.error else "done", result=known))
            return lambda: known
        self._on_standing(Standing(stretch, "starting"))
        try:
            config = self._asked.config_of(stretch.settings, self._asked.run_dir(stretch.run))
        except ConfigError as error:  # values that do not go together
            failed = self._add(stretch, Result(None, str(error)))
            return lambda: failed
        if stretch.donor is not None:
            try:
                _begin_from(self._asked.run_dir(stretch.donor), stretch.first_step, config)
            except CheckpointError as error:
                lost = self._add(stretch, Result(None, str(error)))
                return lambda: lost
        future = self._pool.submit(self._run, stretch, config)
        return lambda: self._wait(future)

    def _wait(self, future: "Future[Result]") -> Result:
        """The result; while it is waited for, a stop that is asked for is handed on."""
        while not wait([future], timeout=_POLL_S).done:
            if self._stopper.asked:
                self._stopper.hand_on()
                self._stop()
        try:
            return future.result()
        except CancelledError as error:
            self._stopper.check_lost()
            raise KeyboardInterrupt from error

    def _stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for stopper in self._stoppers:
            if self._stopper.lost is not None:
                stopper.lose(self._stopper.lost)
            elif not stopper.asked:
                stopper.ask()

    def close(self) -> None:
        """Stop what still runs, and wait for it."""
        self._stop()
        self._pool.shutdown(wait=True)

    def _run(self, stretch: Stretch, config: Config) -> Result:
        watch = _Watch(self._asked.plan.sweep.metric, config.run.dir)
        self._stoppers.append(watch.stopper)
        if self._stopper.asked:
            watch.stopper.ask()

        def follow(progress: Progress) -> None:
            watch.look()
            self._on_standing(Standing(stretch, "training", progress))

        def tell(message: str) -> None:
            self._on_message(f"trial {stretch.trial}: {message}")

        started_s = time.monotonic()
        try:
            if not watch.has_come_to(stretch.last_step):
                train(config, follow, tell, stretch.last_step, watch.stopper)
            result = watch.result(stretch.last_step, time.monotonic() - started_s)
        except (_NoMetricError, StorageError, ClusterLostError):  # of all trials: the same command goes on
            raise
        except GmdistError as error:  # this trial's own: the others go on
            self._stopper.check_lost()
            watch.stopper.check()
            result = Result(None, str(error), seconds=time.monotonic() - started_s)
        return self._add(stretch, result)

    def _add(self, stretch: Stretch, result: Result) -> Result:
        with self._lock:
            self._record.add(stretch, result)
        self._on_standing(Standing(stretch, "failed" if result.error else "done", result=result))
        return result


class _NoMetricError(ConfigError):
    """No evaluation has the metric that trials are compared by."""


class _Watch:
    """Looks at what a trial's evaluations say."""

    def __init__(self, metric: str, run_dir: str) -> None:
        self.stopper = Stopper(lambda message: None)
        self._metric, self._run_dir = metric, run_dir
        self._next_look_s = 0.0

    def _evaluations(self) -> list[dict[str, Any]]:
        lines = read_lines(self._run_dir)
        return [line for line in lines if any(name.startswith("test/") for name in line)]

    def look(self) -> None:
        """Now and then, stop a trial whose evaluations have no such metric: it would be missed at its end only."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S
        if any(self._metric not in line for line in self._evaluations()):
            self.stopper.ask()

    def has_come_to(self, step: int) -> bool:
        """Whether the run has a sound checkpoint of that step, or a later one."""
        if checkpoint.newest_step(self._run_dir) < step:  # most have not, and to see that no shard need be read
            return False
        found, _ = checkpoint.find_newest(self._run_dir)
        return found is not None and found.meta["step"] >= step

    def result(self, step: int, seconds: float) -> Result:
        """What the evaluation at a step says.

        Raises:
            _NoMetricError: it has no such metric.
            KeyboardInterrupt: the run was stopped before that step.
            StorageError: the run's metrics do not go as far.
        """
        evaluations = self._evaluations()
        for line in evaluations:
            if self._metric not in line:
                names = ", ".join(name for name in line if name.startswith("test/"))
                raise _NoMetricError(f"sweep.metric: '{self._metric}'; the evaluation has {names}")
        self.stopper.check()
        value = next((line[self._metric] for line in evaluations if line["step"] == step), None)
        if not evaluations:
            raise _NoMetricError(f"sweep.metric: '{self._metric}'; nothing was evaluated: set data.test")
        if all(line["step"] != step for line in evaluations):
            raise StorageError(
                f"{self._run_dir}: has come to step {step}, and its metrics have no evaluation there; delete that "
                "folder, and the same command trains it again"
            )
        if value is None or not math.isfinite(value):
            return Result(None, f"{self._metric} at step {step} is not a finite number", seconds=seconds)
        speeds = [line["images_per_s"] for line in read_lines(self._run_dir) if "images_per_s" in line]
        return Result(value, images_per_s=speeds[-1] if speeds else None, seconds=seconds)


def _begin_from(source: str, step: int, config: Config) -> None:
    """Begin a run with the checkpoint of another at a step, and with the metrics that led to it.

    Raises:
        CheckpointError: the other has no sound one of that step.
    """
    found, _ = checkpoint.find_newest(config.run.dir)
    if found is not None and found.meta["step"] >= step:  # it was begun, and may have deleted that checkpoint since
        return
    name = checkpoint.folder_name(step)
    target = storage.join(config.run.dir, "checkpoints", name)
    origin = storage.join(source, "checkpoints", name)
    checkpoint.verify(origin, checkpoint.read_meta(origin))
    names = sorted(storage.list_names(origin), key=lambda name: name == checkpoint.META_NAME)  # it makes it complete
    storage.write(storage.join(config.run.dir, runs.CONFIG_NAME), config.to_yaml().encode())
    lines = [json.dumps(line) for line in read_lines(source) if line["step"] <= step]
    storage.write(storage.join(config.run.dir, METRICS_NAME), "".join(f"{line}\n" for line in lines).encode())
    for file in names:
        storage.copy(storage.join(origin, file), storage.join(target, file))
