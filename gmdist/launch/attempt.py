"""One start of a run's workers through Ray Train, watched to its end."""

import os
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gmdist.config import Config
from gmdist.errors import ClusterLostError
from gmdist.launch.cluster import START_TIMEOUT_S
from gmdist.launch.controller import Trainer
from gmdist.launch.mailbox import Failure, Mailbox, News, WorkersFailedError
from gmdist.launch.watch import ClusterWatch, Stopper
from gmdist.launch.worker import work
from gmdist.train.hooks import Outcome, Progress

LOST, NO_ROOM = "WorkerLost", "NoRoom"  # kinds of failures; the second is none of the workers'

_DEATHS = (RayActorError, WorkerHealthCheckFailedError, WorkerGroupStartupFailedError)
_NO_ANSWER = "a worker does not answer: killed, out of memory, stuck for cluster.timeout_s, or its machine lost"
_POLL_S = 0.25
_LOST_S = 60.0  # that workers get to save and end, and a new mailbox to answer, after one was lost
# Large temporaries come from the heap and stay there: without these, a CPU worker spends its time in page faults.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def attempt(
    config: Config,
    size: int,
    on_progress: Callable[[Progress], None],
    on_message: Callable[[str], None],
    last_step: int | None,
    stopper: Stopper,
) -> Outcome:
    """Start the workers once, and watch them to their end."""
    mailbox = _open_mailbox()
    failures: list[Failure] = []
    ended: list[Outcome | Failure] = []
    with tempfile.TemporaryDirectory(prefix="gmdist-ray-") as scratch:
        trainer = _ray_trainer(config, size, mailbox, scratch, last_step)

        def fit() -> None:
            try:
                ended.append(trainer.fit().return_value)
            except Exception as error:  # noqa: BLE001 - of whatever kind, it is said below
                # The error itself would keep the controller alive, and that what is left of the workers.
                ended.append(_explain(error))

        def look() -> bool:
            news: News = ray.get(mailbox.collect.remote())
            for message in news.messages:
                on_message(message)
            if news.progress is not None:
                on_progress(news.progress)
            failures.extend(news.failures)
            return news.progress is not None

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        stopper.mailbox = mailbox
        stopper.check()
        thread.start()
        _check_answers(mailbox)
        try:
            cluster, have_begun = ClusterWatch(config, size, mailbox, on_message), False
            while thread.is_alive():
                thread.join(_POLL_S)
                stopper.hand_on()
                have_begun = look() or have_begun
                cluster.look(have_begun)
            look()
        except RayError as error:
            thread.join(_LOST_S)  # without a mailbox, workers save and return
            if thread.is_alive():  # others must not be started beside them
                raise ClusterLostError(
                    "workers neither answer nor end; end them, and run the same command again"
                ) from error
            lost = "the process between the command and its workers died: killed, or out of memory"
            raise WorkersFailedError(Failure(LOST, lost, traceback.format_exc())) from error
        finally:
            stopper.mailbox = None
    (result,) = ended
    ray.kill(mailbox)
    if isinstance(result, Failure):
        raise WorkersFailedError(_cause(failures, result))
    return result


def _open_mailbox() -> Any:
    """A mailbox on the driver's own node: it is lost with the driver, and not with any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _check_answers(mailbox: Any) -> None:
    """ClusterLostError if a new mailbox does not come up."""
    try:
        ray.get(mailbox.wishes.remote(), timeout=_LOST_S)
    except (RayError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise ClusterLostError(f"Ray does not answer any more ({reason}); run the same command again") from error


def _ray_trainer(config: Config, size: int, mailbox: Any, scratch: str, last_step: int | None) -> Trainer:
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker)} | ({} if cluster.gpus_per_worker else _MALLOC)
    return Trainer(
        work,
        train_loop_config={
            "config": config.to_yaml(),
            "mailbox": mailbox,
            "folder": os.getcwd(),
            "last_step": last_step,
        },
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=int(cluster.timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        # Checkpoints are the run's own business: Ray keeps none, and its folder is thrown away.
        run_config=RunConfig(
            name=f"run-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig("CRITICAL"),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _cause(failures: list[Failure], ended: Failure) -> Failure:
    """The failure to blame.

    Args:
        failures: what workers said before they ended.
        ended: what Ray says.
    """
    users = [failure for failure in failures if failure.for_user() is not None]
    own = [failure for failure in failures if not _is_echo(failure)]
    if users or own:
        return (users or own)[0]
    # A worker that dies or is stuck is not heard, the others are: they wait for it in vain.
    trace = "\n".join([ended.trace, *(failure.trace for failure in failures)])
    if failures and ended.kind != LOST:
        return Failure(LOST, _NO_ANSWER, trace)
    return replace(ended, trace=trace)


def _is_echo(failure: Failure) -> bool:
    """Whether a worker failed because another one did not answer."""
    return failure.kind.startswith("Dist") or any(word in failure.trace for word in ("gloo/transport", "NCCL"))


def _explain(error: Exception) -> Failure:
    """What Ray says of the end of workers."""
    text = str(error)
    causes: list[Exception] = [error]
    if isinstance(error, WorkerGroupError):
        causes = list(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        causes = [error.controller_failure]
    causes = [cause.cause if isinstance(cause, RayTaskError) else cause for cause in causes]
    if "running low on memory" in text:
        reason = "a machine ran out of memory, and Ray killed a worker; set a smaller train.micro_batch_size"
        return Failure(LOST, reason, text)
    if any(isinstance(cause, WorkerGroupStartupTimeoutError) for cause in causes):
        return Failure(NO_ROOM, f"no room for the workers within {START_TIMEOUT_S} s", text)
    if any(isinstance(cause, _DEATHS) for cause in causes):
        return Failure(LOST, _NO_ANSWER, text)
    return Failure.of(causes[0], text)
