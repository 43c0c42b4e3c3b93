"""Opening files that may come from anywhere."""

import errno
import mmap
import os
import stat
from pathlib import PurePosixPath, PureWindowsPath
from typing import BinaryIO

from ._tensors import CheckpointError


# The limit of common file systems in bytes, beyond which the system raises an error of its own.
_LONGEST_NAME = 255
_NONBLOCKING = 0 if os.name == "nt" else os.O_NONBLOCK


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading.

    **Raises:** `CheckpointError`, whose message does not name the file, for a folder, and for a
    named pipe, a device or a socket, which could be waited for or read without end. `OSError` as
    `open` does.
    """
    # Opening a device can have effects, so what it is is checked before.
    try:
        _check_regular(os.stat(path).st_mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CheckpointError("it is a link to itself: replace it by a regular file.") from None
    file = open(path, "rb", opener=_open)  # noqa: SIM115  (The caller closes it.)
    try:
        # The name may by now belong to another file.
        _check_regular(os.fstat(file.fileno()).st_mode)
    except CheckpointError:
        file.close()
        raise
    return file


def _open(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise wait for a writer.
    return os.open(path, flags | _NONBLOCKING)


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise CheckpointError(f"it is {what}: replace it by a regular file.")


def read_bytes(path: str | os.PathLike[str], max_size: int) -> bytes:
    """Reads a regular file as a whole.

    **Arguments:**

    - `path`: the file.
    - `max_size`: the maximum size of the file in bytes.

    **Raises:** `CheckpointError`, whose message does not name the file, for a file that is larger
    or not regular; `OSError` as `open` does.
    """
    with open_regular(path) as file:
        content = file.read(max_size + 1)
        size = max(len(content), os.fstat(file.fileno()).st_size)
    if size > max_size:
        raise CheckpointError(
            f"it has {size} bytes, but at most {max_size} are read, so it cannot be the right "
            "file. Download it again."
        )
    return content


def is_plain_name(name: str) -> bool:
    """Returns whether a name can be that of a file, and contains no path, by the rules of both
    POSIX and Windows.

    Both sets of rules apply on every system, so that a checkpoint is valid everywhere or nowhere.
    """
    return (
        name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
        and "\0" not in name
        and len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME
    )


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Maps a file into memory, read-only.

    **Raises:** `CheckpointError` for anything that is not a regular file, and for an empty file, a
    git-LFS pointer or a web page, which failed downloads leave behind.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError("the file is empty: download or save it again.")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head = buffer[:64]
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "the file is a git-LFS pointer, not the weights it points to: "
            "run `git lfs pull`, or download the file itself."
        )
    # "<" alone would not do: a safetensors file with a header of 60 bytes begins with it as well.
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            "the file is a web page, not weights: the download returned an error or a login page. "
            "Check the address and your access to it, and download the file again."
        )
    return buffer
