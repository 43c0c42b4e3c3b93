"""Signals that stop a training run, and the lock that keeps a second run out of its folder."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ._write_error import write_error


_Handler = Callable[[int, FrameType | None], object] | int | None
_MESSAGE = (
    b"\nFinishing this step and saving a checkpoint. Press Ctrl-C again to stop immediately.\n"
)


class StopRequest:
    """Whether Ctrl-C or SIGTERM has asked the run to stop."""

    requested = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop.

    A second signal has its usual effect, and so has every signal after the context. Nothing happens
    in threads other than the main thread.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only.
        return
    previous: dict[int, _Handler] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()
        # `print` is not reentrant, and the signal may have interrupted one.
        os.write(2, _MESSAGE)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder, because two runs in one folder would overwrite each other's files.

    The operating system releases the lock when the process ends, however it ends. On Windows, and
    on file systems without locks, nothing is locked.

    **Raises:** `ValueError` if another process holds the lock; `CheckpointWriteError` if the folder
    cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise write_error(error, f"Could not write to {folder}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is training in {folder}. Wait until it ends, or choose another "
                "`folder`."
            ) from None
        except OSError:  # The file system has no locks.
            pass
        yield
