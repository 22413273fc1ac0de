"""What each Ray worker runs: its share of a run, with a watchdog beside it and word from the driver."""

import logging
import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError

from gmdist import runs, start, storage
from gmdist.config import Config, from_yaml
from gmdist.launch.lease import LEASE_NAME
from gmdist.launch.mailbox import Failure, News, Wishes
from gmdist.launch.shard_workers import device_of, not_shared
from gmdist.launch.watchdog import Watchdog
from gmdist.train.hooks import Hooks, Outcome, Progress

_POLL_S = 0.25
_ENDED = 1
_STUCK_AFTER = 1.25  # times cluster.timeout_s: a collective that waits for a stuck worker gives up before, and says why


def work(settings: dict[str, Any]) -> Outcome:
    """What each Ray worker runs."""
    mailbox = settings["mailbox"]
    rank = dist.get_rank()
    _quiet()
    if os.path.isdir(settings["folder"]):
        os.chdir(settings["folder"])  # relative paths mean what they mean to the user
    config = from_yaml(settings["config"], "config")
    watchdog = Watchdog(config.cluster.timeout_s * _STUCK_AFTER)
    try:
        check_reach(config)
        device = device_of(config)
        if device.type == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        with _correspondence(mailbox if rank == 0 else None) as hooks:
            return start.train_worker(
                config, device, replace(hooks, beat=watchdog.beat, last_step=settings["last_step"])
            )
    except BaseException as error:
        with suppress(RayActorError):  # the driver is gone
            ray.get(mailbox.fail.remote(Failure.of(error, traceback.format_exc())))
        raise
    finally:
        watchdog.close()


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
    stop, save, done, lock = threading.Event(), threading.Event(), threading.Event(), threading.Lock()
    news = News()
    num_saves = 0  # asked for until now

    def on_progress(progress: Progress) -> None:
        with lock:
            news.progress = progress

    def on_message(message: str) -> None:
        with lock:
            news.messages.append(message)

    def exchange() -> None:
        nonlocal num_saves
        with lock:
            progress, messages = news.progress, list(news.messages)
        wishes: Wishes = ray.get(mailbox.exchange.remote(progress, messages))
        if wishes.end:
            os._exit(_ENDED)  # and Ray ends the others
        with lock:  # told, and only now: what fails is told again
            del news.messages[: len(messages)]
            if news.progress is progress:
                news.progress = None
        if wishes.stop:
            stop.set()
        if wishes.num_saves > num_saves:
            num_saves = wishes.num_saves
            save.set()

    def save_requested() -> bool:
        if not save.is_set():
            return False
        save.clear()
        return True

    def run() -> None:
        while not done.wait(_POLL_S):
            try:
                exchange()
            except RayActorError:
                stop.set()  # the driver is gone: save and return
                return
            except RayError:
                continue  # a fault of Ray's that may pass; what the driver wants must still reach the run

    thread = threading.Thread(target=run, name="mailbox", daemon=True)
    thread.start()
    try:
        yield Hooks(on_progress, on_message, stop.is_set, save_requested)
    finally:
        done.set()
        thread.join()
        with suppress(RayActorError):  # or the work's own end would be lost
            exchange()


def check_reach(config: Config) -> None:
    """ConfigError if the run's folder is one of the driver's machine, and this is another."""
    runs.use_storage(config)
    if not storage.exists(storage.join(config.run.dir, LEASE_NAME)):
        raise not_shared("run.dir", config.run.dir)
