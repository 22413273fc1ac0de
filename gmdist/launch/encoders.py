"""Who encodes the shards of a latent cache: this process, or the workers of a Ray cluster."""

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gmdist import runs
from gmdist.config import Config
from gmdist.data.batch import as_floats
from gmdist.data.latent_shards import EncodedShard, ShardEncoder, SourceShard
from gmdist.data.latents import Record
from gmdist.data.parallel import spread
from gmdist.errors import ConfigError, GmdistError, RunFailedError
from gmdist.families.family import Family
from gmdist.train.engine import computing

if TYPE_CHECKING:
    import ray  # one worker on this machine does without

_SHARDS_AT_ONCE = 2  # of a worker: one is read or written while the other goes through the encoder
_BATCH_SIZE = 32  # where the run has no micro-batch size


@dataclass(frozen=True)
class Work:
    """What a worker has to know."""

    config: Config  # the run's
    family: Family  # on the CPU
    destination: str
    record: Record

    def encoder(self) -> ShardEncoder:
        """Set this process up to encode: its storage and its device."""
        config = self.config
        runs.use_storage(config)
        device = torch.device("cuda") if config.cluster.gpus_per_worker else torch.device("cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("cluster.gpus_per_worker: 1; there is no GPU here: set cluster.gpus_per_worker=0")
        found = Record.load(self.destination)
        if found is None or self.record.difference(found) is not None:
            raise ConfigError(
                f"DEST: {self.destination}; a worker on {os.uname().nodename} does not see what is in it: on several "
                "machines, use a shared folder or s3://"
            )
        return ShardEncoder(
            config.data,
            encoding(self.family, config.train.precision, device),
            self.destination,
            flip=self.record.flip,
            batch_size=config.train.micro_batch_size or _BATCH_SIZE,
        )


def encoding(family: Family, precision: str, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    """Encodes pixels uint8 [N, H, W, C] on a device, as precisely as evaluations do; returns arrays on the CPU."""
    family = family.to(device)

    def call(pixels: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(), computing(precision, device) if precision == "bf16" else nullcontext():
            return {name: array.cpu() for name, array in family.encode(as_floats(pixels.to(device))).items()}

    return call


def encode_shards(work: Work, tasks: Sequence[SourceShard]) -> Generator[EncodedShard]:
    """The shards as they are done: without Ray where one worker of this machine is all that the config asks for."""
    cluster = work.config.cluster
    if not tasks or (cluster.address == "local" and cluster.worker_range[1] == 1):
        return _here(work, tasks)
    return _on_cluster(work, tasks)


def _here(work: Work, tasks: Sequence[SourceShard]) -> Generator[EncodedShard]:
    """The shards, encoded in this process."""
    encoder, before = work.encoder(), torch.get_num_threads()
    # Sums depend on the number of threads, if only in their last bits: it is the same here as on a cluster.
    torch.set_num_threads(work.config.cluster.cpus_per_worker)
    try:
        results = spread(lambda shard: [encoder.shard(shard)], tasks, threads=_SHARDS_AT_ONCE, stopped=encoder.stopped)
        with closing(results):
            yield from results
    finally:
        torch.set_num_threads(before)


class Encoder:
    """An actor that encodes shards, several at once."""

    def __init__(self, stored: "list[ray.ObjectRef[Work]]", num_threads: int) -> None:
        """stored: a list, or Ray would keep the work itself, and complain that it cannot start the actor again."""
        import ray

        self._work, self._lock = ray.get(stored[0]), threading.Lock()
        self._encoder: ShardEncoder | None = None
        torch.set_num_threads(num_threads)

    def shard(self, shard: SourceShard) -> EncodedShard:
        """Encode one shard."""
        with self._lock:
            self._encoder = self._encoder or self._work.encoder()  # here, where errors reach the driver as they are
        return self._encoder.shard(shard)


def _on_cluster(work: Work, tasks: Sequence[SourceShard]) -> Generator[EncodedShard]:
    """The shards, encoded by workers of a Ray cluster; one that is lost is started again, with what it was at."""
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
        )(Encoder)
        stored = [ray.put(work)]
        workers = [actor.remote(stored, cluster.cpus_per_worker) for _ in range(count)]
        waiting = iter(tasks)
        running = {
            worker.shard.remote(shard): worker
            for worker, shard in zip(workers * _SHARDS_AT_ONCE, waiting, strict=False)
        }
        try:
            while running:
                (done,), _ = ray.wait(list(running))
                worker = running.pop(done)
                for shard in islice(waiting, 1):
                    running[worker.shard.remote(shard)] = worker
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
