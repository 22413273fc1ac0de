"""Training on Ray: start the workers, watch them, stop them gracefully, start them again when they fail."""

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from gmdist import start, storage
from gmdist.config import Config
from gmdist.errors import CheckpointError, ConfigError, RunFailedError, StorageError
from gmdist.launch.cluster import connected
from gmdist.launch.lease import held
from gmdist.launch.mailbox import Failure, WorkersFailedError
from gmdist.launch.preflight import check_cluster
from gmdist.launch.watch import Stopper, choose_size
from gmdist.sweep.record import FILE_NAME as SWEEP_NAME
from gmdist.train import checkpoint
from gmdist.train.hooks import Outcome, Progress

_TRACE_NAME = "error.txt"
_MOST_BACKOFF_S = 60.0


def train(
    config: Config,
    on_progress: Callable[[Progress], None],
    on_message: Callable[[str], None],
    last_step: int | None = None,
    stopper: Stopper | None = None,
) -> Outcome:
    """Train a run to its end, going on from its newest checkpoint.

    SIGINT and SIGTERM make the workers save a checkpoint and return; a second signal ends the process at once.

    Args:
        config: the run.
        on_progress: called with where the run stands, about once a logging interval.
        on_message: called with a line that the user should read.
        last_step: where it pauses with a checkpoint, to go on another time; None: it trains to its end.
        stopper: of a sweep, whose trial this is: it asks the workers to stop; None: SIGINT and SIGTERM do.

    Returns:
        Where the run ended; `finished` is False if it was stopped or pauses.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: what a user can mend.
        ClusterLostError: Ray does not answer any more.
        RunFailedError: anything else, after cluster.max_failures restarts.
    """
    finished, warnings_ = start.check_start(config)
    for warning in warnings_:
        on_message(warning)
    if finished is not None:
        return finished
    own = stopper is None
    if own and storage.exists(storage.join(config.run.dir, SWEEP_NAME)):
        raise ConfigError(f"run.dir: {config.run.dir}; holds a sweep ({SWEEP_NAME}); choose another folder for the run")
    # Ray Train takes a second to import: that is done while Ray starts.
    threading.Thread(target=importlib.import_module, args=("gmdist.launch.attempt",), daemon=True).start()
    stopper = stopper or Stopper(on_message)
    with (
        stopper.installed() if own else nullcontext(),
        held(config.run.dir, on_message, partial(stopper.lose, config.run.dir)) as lease,
        # Whether the cluster is large enough, a sweep has looked: a trial waits for machines that were lost since.
        connected(config.cluster, may_be_small=not own),
    ):
        if own and config.cluster.address != "local":  # with the lease: the folder is nobody else's
            check_cluster(config)
        lease.confirm()  # after Ray's start: another command has had the time to write its own
        stopper.check()
        if config.run.overwrite:  # all that can be refused before the start has been
            start.clear(storage.absolute(config.run.dir))
        return _with_restarts(config, on_progress, on_message, last_step, stopper)


def _with_restarts(
    config: Config,
    on_progress: Callable[[Progress], None],
    on_message: Callable[[str], None],
    last_step: int | None,
    stopper: Stopper,
) -> Outcome:
    """Start the workers until they end well, or fail too often."""
    from gmdist.launch.attempt import LOST, NO_ROOM, attempt

    failures, best_step, step, saved = 0, 0, 0, _saved_step(config)

    def follow(progress: Progress) -> None:
        nonlocal step
        step = progress.step
        on_progress(progress)

    size = refused = None
    while True:
        size = choose_size(config, size, refused, on_message, stopper)
        try:
            outcome = attempt(config, size, follow, on_message, last_step, stopper)
            stopper.check_lost()
            refused = None
            if outcome.finished or stopper.asked or outcome.step == last_step:
                storage.delete(storage.join(config.run.dir, _TRACE_NAME))  # of a failure that was overcome
                return outcome
        except WorkersFailedError as error:
            stopper.check_lost()
            if error.failure.kind == NO_ROOM:  # a machine was lost, or others are at work on them
                on_message(f"no room for {size} workers: other jobs may have it")
                refused = size
                continue
            refused = None
            before, saved = saved, _saved_step(config)
            failures = 1 if step > best_step or saved > before else failures + 1
            best_step = max(step, best_step)
            _write_trace(config, error.failure)
            users = error.failure.for_user()
            if users is not None:
                raise users from error
            reason = error.failure.message
            if error.failure.kind != LOST:
                reason = f"{error.failure.kind}: {reason}"
            if failures > config.cluster.max_failures:
                trace = storage.join(config.run.dir, _TRACE_NAME)
                raise RunFailedError(f"{config.run.dir}: {reason}; the traceback is in {trace}") from error
            stopper.check()
            on_message(f"a worker failed ({reason}); restart {failures} of {config.cluster.max_failures}")
            stopper.wait(min(config.cluster.backoff_s * 2 ** (failures - 1), _MOST_BACKOFF_S))


def _saved_step(config: Config) -> int:
    """Of the newest checkpoint; 0 without one. What is wrong with it, or with the storage, the workers say."""
    try:
        found, _ = checkpoint.find_newest(config.run.dir)
    except (CheckpointError, StorageError):
        return 0
    return 0 if found is None else found.meta["step"]


def _write_trace(config: Config, failure: Failure) -> None:
    """Keep the traceback in the run's folder; where even that cannot be written, the line on stderr has to do."""
    try:
        storage.write(storage.join(config.run.dir, _TRACE_NAME), failure.trace.encode())
    except StorageError:
        return
