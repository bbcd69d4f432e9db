"""The loop that runs a plan: one call for all operations, on any number of threads.

The jobs of an operation are divided into one range for each thread, so that the same
columns stay with one thread, in its caches, from layer to layer; moving them costs as
much as computing them. A thread takes the jobs of its own range, and those of a range
that nobody has begun. Only if it has waited for long does it help with the others:
nobody waits for a thread that the system has not scheduled.

The counter of a range holds an epoch in its upper half and the next job in the lower
one; a late thread finds nothing of its epoch and returns. Operations that may overlap
form a group; the next group starts when all jobs of this one are done.
"""

import ctypes
import threading
from typing import Any

import numpy as np

from cram_jax.engine import llvm

RECORD = 8
"""64-bit words of an operation's record."""
CODE, WORDS, JOBS, RANGES, WAIT, DONE, GROUP = range(7)
"""Its kernel, the kernel's arguments, how many jobs, their counters, how many jobs of
its group must be done before the next operation (0: none), how many are, and the first
operation of its group."""
LINE = 8
"""64-bit words of a counter: a cache line, as threads must not disturb each other."""
PATIENCE = 4096
"""How often a thread looks whether the others are done before it helps them: some 20
microseconds."""


def starts(jobs: np.ndarray, threads: int) -> np.ndarray:
    """The first job of every thread's range, (operations, threads)."""
    return jobs[:, None] * np.arange(threads) // threads


_PROGRAM = """
define void @run(ptr %records, i64 %count, i64 %epoch, i64 %thread, i64 %threads,
                 ptr %current, ptr %pause) nounwind {
start:
  br label %operation

operation:
  %i = phi i64 [0, %start], [%following, %advance], [%group, %impatient]
  %is.patient = phi i1 [1, %start], [%is.patient.next, %advance], [0, %impatient]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %ready, label %end

ready:
  %first = mul i64 %i, 8
  %record = getelementptr i64, ptr %records, i64 %first
  %code = load ptr, ptr %record
  %words.at = getelementptr i64, ptr %record, i64 1
  %words = load ptr, ptr %words.at
  %jobs.at = getelementptr i64, ptr %record, i64 2
  %jobs = load i64, ptr %jobs.at
  %ranges.at = getelementptr i64, ptr %record, i64 3
  %ranges = load ptr, ptr %ranges.at
  %wait.at = getelementptr i64, ptr %record, i64 4
  %wait = load i64, ptr %wait.at
  %done.at = getelementptr i64, ptr %record, i64 5
  %done = load ptr, ptr %done.at
  %group.at = getelementptr i64, ptr %record, i64 6
  %group = load i64, ptr %group.at
  br label %range

range:
  %visited = phi i64 [0, %ready], [%visited.next, %left]
  %ahead = add i64 %thread, %visited
  %owner = urem i64 %ahead, %threads
  %its.line = mul i64 %owner, 8
  %next = getelementptr i64, ptr %ranges, i64 %its.line
  %before.it = mul i64 %jobs, %owner
  %begin = udiv i64 %before.it, %threads
  %until.it = add i64 %before.it, %jobs
  %stop = udiv i64 %until.it, %threads
  %is.own = icmp eq i64 %visited, 0
  %state = load atomic i64, ptr %next acquire, align 8
  %reached = and i64 %state, 4294967295
  %is.untouched = icmp eq i64 %reached, %begin
  %is.free = or i1 %is.own, %is.untouched
  %is.urgent = xor i1 %is.patient, true
  %may.take = or i1 %is.free, %is.urgent
  br i1 %may.take, label %take, label %left

take:
  %seen = load atomic i64, ptr %next acquire, align 8
  %its.epoch = lshr i64 %seen, 32
  %is.ours = icmp eq i64 %its.epoch, %epoch
  br i1 %is.ours, label %any, label %end

any:
  %job = and i64 %seen, 4294967295
  %is.left = icmp slt i64 %job, %stop
  br i1 %is.left, label %claim, label %left

claim:
  %increased = add i64 %seen, 1
  %claimed = cmpxchg ptr %next, i64 %seen, i64 %increased acq_rel acquire
  %is.claimed = extractvalue {i64, i1} %claimed, 1
  br i1 %is.claimed, label %work, label %take

work:
  call void %code(ptr %words, i64 %job, i64 %thread)
  %before = atomicrmw add ptr %done, i64 1 acq_rel
  br label %take

left:
  %visited.next = add i64 %visited, 1
  %are.more = icmp slt i64 %visited.next, %threads
  br i1 %are.more, label %range, label %look

look:
  %looks = phi i64 [1, %left], [%looks.next, %again]
  %finished = load atomic i64, ptr %done acquire, align 8
  %is.complete = icmp sge i64 %finished, %wait
  br i1 %is.complete, label %advance, label %incomplete

incomplete:
  %now = load atomic i64, ptr %current acquire, align 8
  %is.current = icmp eq i64 %now, %epoch
  br i1 %is.current, label %spin, label %end

spin:
  %low = and i64 %looks, 255
  %is.weary = icmp eq i64 %low, 0
  br i1 %is.weary, label %yield, label %again

yield:
  %ignored = call i32 %pause()
  %is.long = icmp sge i64 %looks, PATIENCE
  br i1 %is.long, label %impatient, label %again

impatient:
  br label %operation

again:
  %looks.next = add i64 %looks, 1
  br label %look

advance:
  %following = add i64 %i, 1
  %was.last = icmp sgt i64 %wait, 0
  %is.patient.next = or i1 %is.patient, %was.last
  br label %operation

end:
  ret void
}
"""

lock = threading.Lock()
_function: Any = None
_compiled: llvm.Compiled | None = None


def runner() -> Any:
    """``run(records, count, epoch, thread, threads, current, pause)``, without GIL."""
    global _function, _compiled
    with lock:
        if _function is None:
            _compiled = llvm.compile_text(_PROGRAM.replace("PATIENCE", str(PATIENCE)))
            word, pointer = ctypes.c_int64, ctypes.c_void_p
            kinds = (pointer, word, word, word, word, pointer, pointer)
            _function = llvm.function(_compiled.address("run"), *kinds)
    return _function


def pause() -> int:
    """The address of a function that offers the processor to other threads."""
    try:
        library, name = ctypes.CDLL(None), "sched_yield"
    except TypeError:  # Windows
        library, name = ctypes.CDLL("kernel32"), "SwitchToThread"
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address
