"""A guard that watches what a block of code does to the process and to the file system."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax


try:
    import resource
except ImportError:  # Windows
    resource = None

_SECONDS = 10
_MEBIBYTE = 2**20
_MAX_PEAK = 512 * _MEBIBYTE  # more memory than before, at any time within the block
_MAX_MAPPED = 4096 * _MEBIBYTE  # ends a block that would take all memory of the machine
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WRITING = {
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
    "shutil.rmtree": 1,
    "shutil.move": 2,
}
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
    "ctypes.dlopen",
)


class SlowError(BaseException):
    """The block has taken too long. No handler of `Exception` catches this."""


class _Watch:
    """The watch in force, if any. A hook cannot be removed, so one is installed for all."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.folder = ""
        self.may_write = False
        self.faults: list[str] = []

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.root is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (
                any(letter in mode for letter in "wax+")
                if isinstance(mode, str)
                else isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
            )
            self._check(event, path, writes=writes)
        elif event in _WRITING:
            for path in arguments[: _WRITING[event]]:
                self._check(event, path, writes=True)
        elif event in _FORBIDDEN:
            self.faults.append(f"{event} {arguments!r}"[:200])

    def _check(self, event: str, path: object, *, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.realpath(os.fsdecode(path))
        inside = name == self.folder or name.startswith(self.folder + os.sep)
        in_root = name.startswith(os.path.realpath(str(self.root)) + os.sep)
        if inside and (self.may_write or not writes):
            return
        if in_root or (writes and not _is_cache(name)):
            self.faults.append(f"{event} of {name}{' for writing' if writes else ''}")


def _is_cache(name: str) -> bool:
    """Returns whether Python or JAX writes a file for later runs."""
    compiled = jax.config.values.get("jax_compilation_cache_dir") or "/dev/null"
    return "__pycache__" in name or name.startswith((os.path.realpath(compiled), "/dev/null"))


_WATCH = _Watch()


@contextlib.contextmanager
def watched(root: Path, folder: Path, *, may_write: bool) -> Iterator[list[str]]:
    """Watches a block, and yields a list of what it should not have done.

    The faults are: opening a file of `root` outside of `folder`; writing, renaming or deleting any
    file outside of `folder` (or in it, unless `may_write`); starting a process, connecting to
    an address; and taking much memory. A block that takes too long ends by `SlowError`.

    **Arguments:**

    - `root`: a folder whose other content must not be read.
    - `folder`: the folder in `root` that is given to the code.
    - `may_write`: whether the code may change `folder`.
    """
    if not _WATCH.folder:
        sys.addaudithook(_WATCH.hook)
    _WATCH.folder, _WATCH.may_write, _WATCH.faults = os.path.realpath(folder), may_write, []
    with _limits():
        before = _reset_peak()
        _WATCH.root = root
        try:
            yield _WATCH.faults
        finally:
            _WATCH.root = None
            more = _peak() - before
            if more > _MAX_PEAK:
                _WATCH.faults.append(f"{more // _MEBIBYTE} MiB of memory")


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SlowError(f"The block has taken over {_SECONDS} s.")

    if resource is None or not _STATUS.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _kilobytes("VmSize") * 1024
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MAX_MAPPED, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak() -> int:
    """Forgets the peak of this process's memory, and returns its current memory in bytes."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")
    return _kilobytes("VmRSS") * 1024


def _peak() -> int:
    return _kilobytes("VmHWM") * 1024


def _kilobytes(name: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
