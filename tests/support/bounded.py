"""A time limit for code that must not hang or take quadratic time."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def bounded(seconds: float = 10.0) -> Iterator[None]:
    """Asserts that this thread computes for less than `seconds` within the block.

    Each case usually takes less than one second. The limit is generous because machines differ and
    the failures it detects take minutes. Garbage collection is off within the block, because it
    would traverse the objects of all other tests.
    """
    gc.disable()
    began = time.thread_time()
    try:
        yield
        assert time.thread_time() - began < seconds
    finally:
        gc.enable()
