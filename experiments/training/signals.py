"""SIGINT and SIGTERM while a run trains."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the current step can finish.

    The second one interrupts. Several processes would have to agree on a step: there,
    and outside the main thread, signals do what they always do.
    """
    caught: list[int] = []
    if (
        jax.process_count() > 1
        or threading.current_thread() is not threading.main_thread()
    ):
        yield caught
        return

    def catch(number: int, frame: Any) -> None:
        del frame
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
