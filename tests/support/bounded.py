"""For what must not hang, nor take time that grows with the square of what a file says."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def bounded(seconds: float = 10.0) -> Iterator[None]:
    """Holds that this thread works for no more than that.

    Here each such case takes less than one second. The bound is wide, since machines differ, and
    what it is there for takes minutes. Python's collector of garbage is off meanwhile: it goes
    through all that the other tests have left behind.
    """
    gc.disable()
    began = time.thread_time()
    try:
        yield
        assert time.thread_time() - began < seconds
    finally:
        gc.enable()
