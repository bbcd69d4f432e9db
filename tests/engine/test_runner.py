"""Who does which jobs: kernels that call Python, on threads that come late or never."""

import ctypes
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from cram_jax.engine import executor, jit
from cram_jax.engine.buffers import Buffer, Step
from cram_jax.engine.executor import Program
from cram_jax.engine.geometry import Grid
from cram_jax.engine.kernels import KernelSpec
from cram_jax.engine.targets import choose_target

Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
GROUPS = [[7, 4], [1], [12], [5, 3, 6]]  # jobs of operations that may overlap


@dataclass(frozen=True)
class Numbered(KernelSpec):
    """The kernel of an operation, by its number."""

    arguments = ()
    number: int


@pytest.fixture
def program(monkeypatch):
    """Makes a program of GROUPS; its jobs call a function of operation, job, thread."""
    kernels = {}

    def make(threads, call):
        buffers = [Buffer(4, Grid(1, 8, (1, 8)), "f32", 0) for _ in range(5)]
        steps, numbers = [], itertools.count()
        for group, jobs_of_group in enumerate(GROUPS):
            for jobs in jobs_of_group:
                spec = Numbered(next(numbers))
                reads, writes = buffers[group : group + 1], buffers[group + 1 :][:1]
                step = Step(f"{group}", spec, {}, jobs, tuple(reads), tuple(writes))
                steps.append(step)
                kernels[spec] = Kernel(
                    lambda words, job, thread, n=spec.number: call(n, job, thread)
                )
        return Program(steps, choose_target(), threads)

    def address(spec, target):
        return ctypes.cast(kernels[spec], ctypes.c_void_p).value

    monkeypatch.setattr(jit, "compile_kernels", lambda specs, target: None)
    monkeypatch.setattr(jit, "kernel_address", address)
    return make


EVERY = {
    (number, job)
    for number, jobs in enumerate(itertools.chain(*GROUPS))
    for job in range(jobs)
}
GROUP_OF = [group for group, jobs in enumerate(GROUPS) for _ in jobs]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_job_is_done_once_and_groups_in_order(program, threads):
    done, lock = [], threading.Lock()

    def call(number, job, thread):
        with lock:
            done.append((number, job))

    run = program(threads, call)
    for _ in range(50):
        done.clear()
        run.run()
        assert Counter(done) == Counter(EVERY)
        groups = [GROUP_OF[number] for number, _ in done]
        assert groups == sorted(groups)


def test_a_thread_that_never_comes_is_replaced(program, monkeypatch):
    monkeypatch.setattr(executor._pool, "submit", lambda work, *arguments: None)
    done = []
    program(3, lambda *job: done.append(job)).run()
    assert sorted(done) == sorted((*job, 0) for job in EVERY)


def test_threads_keep_to_their_own_jobs(program):
    """They start together, and none is slow: ranges are the same in every call."""
    who = {}
    meeting = threading.Barrier(2)

    def call(number, job, thread):
        if (number, job) in ((0, 0), (0, 3)):  # the first of each range
            meeting.wait(20)
        if number == 3:
            meeting.wait(20)  # in step: six jobs each
        who[number, job] = thread

    program(2, call).run()
    assert [who[3, job] for job in range(12)] == [0] * 6 + [1] * 6


@pytest.mark.parametrize("where", [(0, 5), (3, 7), (5, 1)])
def test_others_do_the_jobs_of_a_thread_that_is_stuck(program, where):
    """All but the job that it is stuck in, also of the operations before in a group."""
    done, stuck, group = [], threading.Event(), GROUP_OF[where[0]]
    left = {job for job in EVERY if GROUP_OF[job[0]] <= group} - {where}

    def call(number, job, thread):
        if (number, job) == where:
            assert stuck.wait(20)
        done.append((number, job))
        if left <= set(done):
            stuck.set()

    run = program(2, call)
    run.run()
    assert Counter(done) == Counter(EVERY)


def test_after_a_failure_no_job_is_running(program, monkeypatch):
    """Or it would count as one of the next call."""
    running, lock = [0], threading.Lock()
    submit, slow = executor._pool.submit, [True]

    def call(number, job, thread):
        with lock:
            running[0] += 1
        if slow[0]:
            time.sleep(0.001)
        with lock:
            running[0] -= 1

    def submit_one(work, epoch, thread):
        if thread == 2:
            raise KeyboardInterrupt
        submit(work, epoch, thread)

    run = program(3, call)
    monkeypatch.setattr(executor._pool, "submit", submit_one)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert running == [0]
    assert (run._done[:, 0] == [sum(jobs) for jobs in GROUPS]).all()


def test_threads_that_cannot_start_are_not_counted(program, monkeypatch):
    """As in a container whose number of processes is limited."""
    pool = executor._Pool()
    monkeypatch.setattr(executor, "_pool", pool)
    done = []
    run = program(3, lambda *job: done.append(job))

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(20):
            run.run()
    assert sorted(done) == sorted(20 * [(*job, 0) for job in EVERY])
    assert (pool._threads, pool._idle, pool._queue.qsize()) == (0, 0, 0)
    run.run()
    assert pool._threads > 0
