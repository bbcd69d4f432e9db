"""Runs the steps of a plan, on a pool of threads that all engines share."""

import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cram_jax.engine import jit, llvm, runner
from cram_jax.engine.buffers import Step
from cram_jax.engine.plan import groups_of
from cram_jax.engine.targets import Target


class Program:
    """Compiled steps, as the records that `runner` reads, with their memory."""

    def __init__(self, steps: Sequence[Step], target: Target, threads: int):
        jit.compile_kernels([step.spec for step in steps], target)
        self.steps, self.threads = list(steps), threads
        self._words = [step.encode() for step in steps]
        self._records = np.zeros((len(steps), runner.RECORD), np.int64)
        groups = list(groups_of(steps))
        # A cache line for every counter, and one for the epoch.
        self._counters = np.zeros((len(groups) + 1, runner.LINE), np.int64)
        self._ranges = np.zeros((len(steps), threads, runner.LINE), np.int64)
        self._epoch = 0
        row = 0
        for number, group in enumerate(groups):
            total, first = sum(step.jobs for step in group), row
            for step in group:
                record = self._records[row]
                record[runner.CODE] = jit.kernel_address(step.spec, target)
                record[runner.WORDS] = self._words[row].ctypes.data
                record[runner.JOBS] = step.jobs
                record[runner.RANGES] = self._ranges[row].ctypes.data
                record[runner.WAIT] = total if step is group[-1] else 0
                record[runner.DONE] = self._counters[number].ctypes.data
                record[runner.GROUP] = first
                row += 1
        self._run = runner.runner()
        # Looked up once: in a small network the lookup would take as long as the call.
        self._next = self._ranges[:, :, 0]
        self._starts = runner.starts(self._records[:, runner.JOBS], threads)
        self._done, self._current = self._counters[:-1], self._counters[-1]
        self._before = (self._records.ctypes.data, len(self._records))
        self._after = (threads, self._current.ctypes.data, runner.pause())

    def run(self) -> None:
        """Runs all steps; one caller at a time.

        Whatever happens, no job is running when it ends: an interrupt, or a thread that
        cannot be started, leaves nothing to the next call.
        """
        epoch = self._epoch = self._epoch % 2**30 + 1
        # First the epoch, so that late threads leave; then its counters.
        self._current[0] = epoch
        self._done.fill(0)
        np.add(self._starts, epoch << 32, out=self._next)
        try:
            for thread in range(1, self.threads):
                _pool.submit(self._work, epoch, thread)
        finally:
            # Not by a function in Python, at whose start an interrupt may be raised.
            self._run(*self._before, epoch, 0, *self._after)

    def _work(self, epoch: int, thread: int) -> None:
        self._run(*self._before, epoch, thread, *self._after)


class _Pool:
    """Threads that wait for work; they are made when they are first needed."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, work: Any, *arguments: Any) -> None:
        """Runs work on some thread, soon; never, if no thread can be started."""
        with self._lock:
            if self._queue.qsize() >= self._idle and self._threads < _limit():
                name = f"cram_jax-engine-{self._threads + 1}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # too many in this process
                    return
                self._threads += 1
                self._idle += 1
        self._queue.put((work, arguments))

    def _serve(self) -> None:
        while True:
            work, arguments = self._queue.get()
            with self._lock:
                self._idle -= 1
            work(*arguments)
            del work, arguments
            with self._lock:
                self._idle += 1


def _limit() -> int:
    return 4 * (os.cpu_count() or 1)


_pool = _Pool()


# In the order in which they are taken. LLVM has locks of its own, so nothing may be
# compiled by another thread during a fork: the one that forks holds these, in the
# parent and in the child.
_COMPILING = (runner.lock, jit.lock, llvm.lock)


def _before_fork() -> None:
    for lock in _COMPILING:
        lock.acquire()


def _after_fork() -> None:
    for lock in reversed(_COMPILING):
        lock.release()


def _in_child() -> None:
    """A child has none of the threads."""
    global _pool
    _pool = _Pool()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child
    )
