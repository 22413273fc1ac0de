"""Training on Ray: start the workers, watch them, stop them gracefully, start them again when they fail."""

import logging
import os
import signal
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gmdist import runs, storage
from gmdist.config import Config, from_yaml
from gmdist.errors import CheckpointError, ConfigError, DataError, GmdistError, StorageError
from gmdist.launch.cluster import connected
from gmdist.launch.mailbox import Failure, Mailbox, News
from gmdist.train.hooks import Hooks, Outcome, Progress

_TRACE_NAME = "error.txt"
_POLL_S = 0.25
_LOST_S = 60.0  # that workers get to save and end, and a new mailbox to answer, after one was lost
_BACKOFF_S = 1.0  # before the first restart; doubles with each
_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, StorageError)}
# Large temporaries come from the heap and stay there: without these, a CPU worker spends its time in page faults.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class RunFailedError(GmdistError):
    """The workers failed more often than cluster.max_failures allows. Exit code 1."""


def train(config: Config, on_progress: Callable[[Progress], None], on_message: Callable[[str], None]) -> Outcome:
    """Train a run to its end, going on from its newest checkpoint.

    SIGINT and SIGTERM make the workers save a checkpoint and return; a second signal ends the process at once.

    Args:
        config: the run.
        on_progress: called with where the run stands, about once a logging interval.
        on_message: called with a line that the user should read.

    Returns:
        Where the run ended; `finished` is False if it was stopped.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: what a user can mend.
        RunFailedError: anything else, after cluster.max_failures restarts.
    """
    finished, warnings_ = runs.check_start(config)
    for warning in warnings_:
        on_message(warning)
    if finished is not None:
        return finished
    stopper = _Stopper(on_message)
    # Ray takes SIGTERM for itself when it starts: the handlers are set again after it.
    with stopper.installed(), connected(config.cluster), stopper.installed():
        stopper.check()
        if config.run.overwrite:  # all that can be refused before the start has been
            runs.clear(storage.absolute(config.run.dir))
        failures = 0
        while True:
            stopper.check()
            try:
                outcome = _attempt(config, on_progress, on_message, stopper)
                storage.delete(storage.join(config.run.dir, _TRACE_NAME))  # of a failure that was overcome
                return outcome
            except _WorkersFailedError as error:
                failures += 1
                _write_trace(config, error.failure)
                if error.failure.kind in _ERRORS:
                    raise _ERRORS[error.failure.kind](error.failure.message) from error
                reason = f"{error.failure.kind}: {error.failure.message}"
                if failures > config.cluster.max_failures:
                    trace = storage.join(config.run.dir, _TRACE_NAME)
                    raise RunFailedError(f"{config.run.dir}: {reason}; the traceback is in {trace}") from error
                stopper.check()
                on_message(f"a worker failed ({reason}); restart {failures} of {config.cluster.max_failures}")
                time.sleep(_BACKOFF_S * 2 ** (failures - 1))


class _WorkersFailedError(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _attempt(
    config: Config, on_progress: Callable[[Progress], None], on_message: Callable[[str], None], stopper: "_Stopper"
) -> Outcome:
    """Start the workers once, and watch them to their end."""
    mailbox = _open_mailbox()
    result: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="gmdist-ray-") as scratch:
        trainer = _ray_trainer(config, mailbox, scratch)

        def fit() -> None:
            try:
                result.append(trainer.fit())
            except (TrainingFailedError, RayError) as error:
                result.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        failures: list[Failure] = []

        def look() -> None:
            news: News = ray.get(mailbox.collect.remote())
            for message in news.messages:
                on_message(message)
            if news.progress is not None:
                on_progress(news.progress)
            failures.extend(news.failures)

        stopper.mailbox = mailbox
        stopper.check()
        thread.start()
        _check_answers(mailbox)
        try:
            while thread.is_alive():
                thread.join(_POLL_S)
                look()
            look()
        except RayError as error:
            thread.join(_LOST_S)  # without a mailbox, workers save and return
            lost = "the process between the command and its workers died: killed, or out of memory"
            raise _WorkersFailedError(Failure("MailboxLost", lost, traceback.format_exc())) from error
        finally:
            stopper.mailbox = None
    ray.kill(mailbox)
    ended = result[0]
    if isinstance(ended, Exception):
        raise _WorkersFailedError(_cause(failures, ended)) from ended
    return ended.return_value


def _open_mailbox() -> Any:
    """A mailbox on the driver's own node: it is lost with the driver, and not with any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _check_answers(mailbox: Any) -> None:
    """RunFailedError if a new mailbox does not come up."""
    try:
        ray.get(mailbox.stop_requested.remote(), timeout=_LOST_S)
    except (RayError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise RunFailedError(f"Ray does not answer any more ({reason}); run the same command again") from error


def _ray_trainer(config: Config, mailbox: Any, scratch: str) -> TorchTrainer:
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker)} | ({} if cluster.gpus_per_worker else _MALLOC)
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.to_yaml(), "mailbox": mailbox, "folder": os.getcwd()},
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=int(cluster.timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        # Checkpoints are the run's own business: Ray keeps none, and its folder is thrown away.
        run_config=RayRunConfig(
            name=f"{config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig("CRITICAL"),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _worker(settings: dict[str, Any]) -> Outcome:
    """What each Ray worker runs."""
    mailbox = settings["mailbox"]
    rank = dist.get_rank()
    _quiet()
    if os.path.isdir(settings["folder"]):
        os.chdir(settings["folder"])  # relative paths mean what they mean to the user
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        with _correspondence(mailbox if rank == 0 else None) as hooks:
            return runs.train_worker(from_yaml(settings["config"], "config"), device, hooks)
    except BaseException as error:
        message = str(error) if isinstance(error, GmdistError) else (str(error).splitlines() or [""])[0]
        failure = Failure(type(error).__name__, message, traceback.format_exc())
        ray.get(mailbox.fail.remote(failure))
        raise


def _quiet() -> None:
    """Leave libraries' chatter out of a worker's output."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


@contextmanager
def _correspondence(mailbox: Any | None) -> Iterator[Hooks]:
    """Rank 0's connection to the mailbox: a thread that exchanges news, so that no step waits for it."""
    if mailbox is None:
        yield Hooks()
        return
    stop, done, lock = threading.Event(), threading.Event(), threading.Lock()
    news = News()

    def on_progress(progress: Progress) -> None:
        with lock:
            news.progress = progress

    def on_message(message: str) -> None:
        with lock:
            news.messages.append(message)

    def exchange() -> None:
        with lock:
            progress, messages = news.progress, news.messages
            news.progress, news.messages = None, []
        if ray.get(mailbox.exchange.remote(progress, messages)):
            stop.set()

    def run() -> None:
        try:
            while not done.wait(_POLL_S):
                exchange()
        except RayActorError:
            stop.set()  # the driver is gone: save and return

    thread = threading.Thread(target=run, name="mailbox", daemon=True)
    thread.start()
    try:
        yield Hooks(on_progress, on_message, stop.is_set)
    finally:
        done.set()
        thread.join()
        exchange()


class _Stopper:
    """While installed, the first SIGINT or SIGTERM asks the workers to stop, the second ends the process at once.

    It is there before Ray is: an interrupt during Ray's own start would be swallowed.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.mailbox: Any = None  # of the workers that are running, if any
        self.asked = False
        self._on_message = on_message

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._on_message("stopping: running workers save a checkpoint first; once more to stop at once")
        if self.mailbox is not None:
            self.mailbox.request_stop.remote()

    def check(self) -> None:
        """KeyboardInterrupt if a stop was asked for while no worker ran."""
        if self.asked:
            raise KeyboardInterrupt


def _cause(failures: list[Failure], ended: Exception) -> Failure:
    """The failure to blame: a user's error before any other, the first before the ones that followed from it."""
    users = [failure for failure in failures if failure.kind in _ERRORS]
    if users or failures:
        return (users or failures)[0]
    if isinstance(ended, TrainingFailedError):
        lost = "a worker process died without a word: killed, or out of memory"
        return Failure("WorkerLost", lost, str(ended))
    return Failure(type(ended).__name__, str(ended).splitlines()[0], str(ended))


def _write_trace(config: Config, failure: Failure) -> None:
    """Keep the traceback in the run's folder; where even that cannot be written, the line on stderr has to do."""
    try:
        storage.write(storage.join(config.run.dir, _TRACE_NAME), failure.trace.encode())
    except StorageError:
        return
