"""Who makes the shards of a data set, each by itself: this process, or the workers of a Ray cluster."""

import os
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from gmdist.config import Config
from gmdist.data.parallel import spread
from gmdist.errors import ConfigError, GmdistError, RunFailedError
from gmdist.runs import keep_fp32

if TYPE_CHECKING:
    import ray  # one worker on this machine does without

Task = TypeVar("Task", contravariant=True)
Made = TypeVar("Made", covariant=True)
_SHARDS_AT_ONCE = 2  # of a worker: one is read or written while the other goes through the networks


def not_shared(key: str, location: str) -> ConfigError:
    """What a worker says of a folder that is one of the driver's machine, where this is another."""
    return ConfigError(
        f"{key}: {location}; a worker on {os.uname().nodename} does not see what is in it: on several machines, use a "
        "shared folder or s3://"
    )


class Maker(Protocol[Task, Made]):
    """Makes shards; several threads may ask it."""

    stopped: threading.Event  # ends the work early, with a StorageError

    def shard(self, task: Task) -> Made:
        """Make one shard: the same bytes whoever makes it, and when."""


class Work(Protocol[Task, Made]):
    """What a worker has to know."""

    @property
    def config(self) -> Config:
        """The run's; its section cluster says how many workers there are."""

    @property
    def destination(self) -> str:
        """Where the shards go."""

    def maker(self) -> Maker[Task, Made]:
        """Set this process up: its storage and its device."""


def device_of(config: Config) -> torch.device:
    """The device of this worker; ConfigError if it has no GPU where the config asks for one."""
    if not config.cluster.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("cluster.gpus_per_worker: 1; there is no GPU here: set cluster.gpus_per_worker=0")
    keep_fp32()
    return torch.device("cuda", torch.cuda.current_device())


def make_shards(work: Work[Task, Made], tasks: Sequence[Task]) -> Generator[Made]:
    """The shards as they are done: without Ray where one worker of this machine is all that the config asks for."""
    cluster = work.config.cluster
    if not tasks or (cluster.address == "local" and cluster.worker_range[1] == 1):
        return _here(work, tasks)
    return _on_cluster(work, tasks)


def _here(work: Work[Task, Made], tasks: Sequence[Task]) -> Generator[Made]:
    """The shards, made in this process."""
    maker, before = work.maker(), torch.get_num_threads()
    # Sums depend on the number of threads, if only in their last bits: it is the same here as on a cluster.
    torch.set_num_threads(work.config.cluster.cpus_per_worker)
    try:
        results = spread(lambda shard: [maker.shard(shard)], tasks, threads=_SHARDS_AT_ONCE, stopped=maker.stopped)
        with closing(results):
            yield from results
    finally:
        torch.set_num_threads(before)


class Worker:
    """An actor that makes shards, several at once."""

    def __init__(self, num_threads: int) -> None:
        self._lock = threading.Lock()
        self._maker: Maker[Any, Any] | None = None
        torch.set_num_threads(num_threads)

    def shard(self, task: Any, stored: "list[ray.ObjectRef[Work[Any, Any]]]") -> Any:
        """Make one shard of the work that is stored: a list, as Ray would read the work itself for each shard."""
        import ray

        with self._lock:
            self._maker = self._maker or ray.get(stored[0]).maker()
        return self._maker.shard(task)


def _on_cluster(work: Work[Task, Made], tasks: Sequence[Task]) -> Generator[Made]:
    """The shards, made by workers of a Ray cluster; one that is lost is started again, with what it was at."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    from gmdist.launch.cluster import connected, room

    cluster = work.config.cluster
    with connected(cluster):
        least, most = cluster.worker_range
        count = min(len(tasks), max(least, min(most, room(cluster))))
        actor = ray.remote(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_concurrency=_SHARDS_AT_ONCE,
            max_restarts=cluster.max_failures,
            max_task_retries=cluster.max_failures,
        )(Worker)
        stored = [ray.put(work)]
        workers = [actor.remote(cluster.cpus_per_worker) for _ in range(count)]
        waiting = iter(tasks)
        running = {
            worker.shard.remote(shard, stored): worker
            for worker, shard in zip(workers * _SHARDS_AT_ONCE, waiting, strict=False)
        }
        try:
            while running:
                (done,), _ = ray.wait(list(running))
                worker = running.pop(done)
                for shard in islice(waiting, 1):
                    running[worker.shard.remote(shard, stored)] = worker
                yield ray.get(done)
        except RayTaskError as error:
            if isinstance(error.cause, GmdistError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise RunFailedError(
                f"{work.destination}: a worker was lost more than {cluster.max_failures} times: killed, out of memory, "
                "or its machine lost; run the same command again: it goes on where it stopped"
            ) from error
        finally:
            for worker in workers:
                ray.kill(worker)
