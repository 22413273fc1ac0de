"""Work on several cores: processes that end when their parent does, or threads."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from gmdist import s3
from gmdist.errors import DataError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_AHEAD = 2  # tasks that wait, for each one that runs: a million futures would fill the memory
_POLL_S = 0.1


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    call: Callable[[_Task], Iterable[_Result]],
    tasks: Iterable[_Task],
    *,
    processes: int = 0,
    threads: int = 1,
    stopped: threading.Event | None = None,
) -> Generator[_Result]:
    """What a call yields for each task, as it comes.

    Args:
        call: with processes, a function of a module, or a partial of one.
        tasks: its arguments.
        processes: that run it; 0 or 1: this one.
        threads: that run it, in this process.
        stopped: set when nobody waits any more for what the threads are at.

    Raises:
        DataError: a process was killed.
    """
    if processes <= 1 and threads <= 1:
        for task in tasks:
            yield from call(task)
        return
    with _processes(processes) if processes > 1 else _threads(threads, stopped) as (pool, fill, results):
        waiting = iter(tasks)
        ahead = zip(range(_AHEAD * max(processes, threads)), waiting, strict=False)
        running = {pool.submit(fill, call, task) for _, task in ahead}
        while running:
            done, running = wait(running, _POLL_S, FIRST_COMPLETED)
            running |= {pool.submit(fill, call, task) for _, task in zip(done, waiting, strict=False)}
            while not results.empty():
                yield results.get()
            for future in done:
                future.result()


_Fill = Callable[[Callable[[Any], Iterable[Any]], Any], None]  # puts what a call yields for a task into the results


@contextmanager
def _threads(count: int, stopped: threading.Event | None) -> Iterator[tuple[Executor, _Fill, Any]]:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(count)
    try:
        yield pool, partial(_fill, results), results
    finally:
        if stopped is not None:
            stopped.set()
        pool.shutdown(cancel_futures=True)


def _fill(results: Any, call: Callable[[_Task], Iterable[_Result]], task: _Task) -> None:
    for result in call(task):
        results.put(result)


@contextmanager
def _processes(count: int) -> Iterator[tuple[Executor, _Fill, Any]]:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    results = context.SimpleQueue()
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(s3.config(), results))
    try:
        yield pool, _fill_own, results
    except BrokenProcessPool as error:
        raise DataError(
            "a process was killed, perhaps by the system for want of memory; run the same command again: it goes on "
            "where it stopped"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # nobody waits for what they are at
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_own: Any = None  # of a process that was started here: where its results go


def _fill_own(call: Callable[[_Task], Iterable[_Result]], task: _Task) -> None:
    _fill(_own, call, task)


def _begin(config: s3.S3Config, results: Any) -> None:
    """In a new process: storage as in its parent, and an end when the parent ends in whatever way."""
    global _own
    _own = results
    s3.configure(config)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
