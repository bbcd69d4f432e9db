"""The loop that runs a plan: one call for all operations, on any number of threads.

Every thread that calls `run` takes jobs from each operation in turn. ``next`` of a
record holds an epoch in its upper half and the next job in the lower one. A late thread
finds nothing of its epoch and returns, so that nobody waits for a thread that the
system has not scheduled. The next operation starts when ``wait`` jobs are done.
"""

import ctypes
import threading
from typing import Any

from cram_jax.engine import llvm

RECORD = 8
"""64-bit words of an operation's record."""
CODE, WORDS, JOBS, NEXT, WAIT, DONE = range(6)

_PROGRAM = """
define void @run(ptr %records, i64 %count, i64 %epoch, i64 %thread, ptr %current,
                 ptr %pause) nounwind {
start:
  br label %operation

operation:
  %i = phi i64 [0, %start], [%following, %advance]
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
  %next = getelementptr i64, ptr %record, i64 3
  %wait.at = getelementptr i64, ptr %record, i64 4
  %wait = load i64, ptr %wait.at
  %done.at = getelementptr i64, ptr %record, i64 5
  %done = load ptr, ptr %done.at
  br label %take

take:
  %seen = load atomic i64, ptr %next acquire, align 8
  %its.epoch = lshr i64 %seen, 32
  %is.ours = icmp eq i64 %its.epoch, %epoch
  br i1 %is.ours, label %any, label %end

any:
  %job = and i64 %seen, 4294967295
  %is.left = icmp slt i64 %job, %jobs
  br i1 %is.left, label %claim, label %look

claim:
  %increased = add i64 %seen, 1
  %claimed = cmpxchg ptr %next, i64 %seen, i64 %increased acq_rel acquire
  %is.claimed = extractvalue {i64, i1} %claimed, 1
  br i1 %is.claimed, label %work, label %take

work:
  call void %code(ptr %words, i64 %job, i64 %thread)
  %before = atomicrmw add ptr %done, i64 1 acq_rel
  br label %take

look:
  %looks = phi i64 [1, %any], [%looks.next, %again]
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
  br label %again

again:
  %looks.next = add i64 %looks, 1
  br label %look

advance:
  %following = add i64 %i, 1
  br label %operation

end:
  ret void
}
"""

lock = threading.Lock()
_function: Any = None
_compiled: llvm.Compiled | None = None


def runner() -> Any:
    """``run(records, count, epoch, thread, current, pause)``, without the GIL."""
    global _function, _compiled
    with lock:
        if _function is None:
            _compiled = llvm.compile_text(_PROGRAM)
            word, pointer = ctypes.c_int64, ctypes.c_void_p
            kinds = (pointer, word, word, word, pointer, pointer)
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
