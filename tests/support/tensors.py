"""Helpers for the tests of files of tensors."""

from collections.abc import Callable
from pathlib import Path

from mamba_eqx.formats import StoredTensor


Opener = Callable[[bytes], dict[str, StoredTensor]]


def opener(open_file: Callable[[Path], dict[str, StoredTensor]], path: Path) -> Opener:
    """Returns a function that writes bytes to `path` and opens them."""

    def open_bytes(data: bytes) -> dict[str, StoredTensor]:
        # A new file leaves the mapping of the earlier one unchanged.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return open_file(path)

    return open_bytes


def check_readable(tensors: dict[str, StoredTensor], limit: int) -> None:
    """Asserts that tensors can be read as their headers describe, in at most `limit` bytes each."""
    for name, stored in tensors.items():
        array = stored.read()
        assert stored.name == name
        assert array.shape == stored.shape
        assert array.dtype == stored.dtype
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert array.nbytes <= limit
