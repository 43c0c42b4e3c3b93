"""Files and folders that appear under their names complete or not at all.

The content is written under a temporary name beside its destination and then renamed, because a
rename is atomic within one file system only.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path


_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file, which is renamed to `path` when the block succeeds.

    The block may write to the temporary file or replace it. An existing file at `path` is replaced
    by one rename. If the block raises, `path` is untouched and the temporary file is removed. The
    content is not forced to disk.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    try:
        with _errors_name(path), open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        with _errors_name(path):
            # The safetensors package replaces the file with one that only its owner may read.
            os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # There is no such file, or not even its folder.
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder, which is renamed to `path` when the block succeeds.

    If the block raises, `path` is untouched and the temporary folder is removed.

    **Arguments:**

    - `path`: the folder. An existing folder is removed first, so for a moment there is none, but
        never an incomplete one.
    - `sync`: whether to force the content to disk before the rename, and the rename itself
        afterwards. Otherwise a power failure may leave `path` with empty files.
    """
    path = Path(path)
    with temporary_folder(path) as temporary:
        yield temporary
        if sync:
            for written in (*sorted(temporary.rglob("*")), temporary):
                _sync(written)
        remove_folder(path)
        os.rename(temporary, path)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def temporary_folder(
    path: str | os.PathLike[str], *, wanted: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which is removed after the block.

    The folder is on the same file system as `path`, so files can be renamed from one to the other.

    **Arguments:**

    - `path`: a path in the folder that is to contain the new one.
    - `wanted`: the path that errors name; `path` if `None`.
    """
    temporary = _temporary_path(Path(path))
    try:
        with _errors_name(path if wanted is None else wanted):
            temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replaced_files(
    path: str | os.PathLike[str],
    *,
    stale: Callable[[str], bool] = lambda name: False,
    last: Collection[str] = (),
) -> Iterator[Path]:
    """Yields an empty folder, whose files replace those in `path` when the block succeeds.

    The files of the same names and those that are `stale` are moved away, and the new ones moved
    in. Other files are left alone. A link is replaced itself, and what it leads to is untouched.
    If the block raises or one move fails, `path` is as before.

    **Arguments:**

    - `path`: the folder, which is created if it does not exist.
    - `stale`: returns whether the old file of a name is removed even if there is no new one.
    - `last`: the names of files that are moved away first and moved in last, so that a folder that
        a power failure leaves incomplete has none of them, and is refused instead of misread.

    **Raises:** `FileExistsError` if `path` is a file.
    """
    # Links to the folder are followed, because files are moved within one file system only.
    # (`Path.resolve` raises a `RuntimeError` for a link to itself.)
    folder = Path(os.path.realpath(path))
    exists = folder.is_dir()
    if os.path.lexists(folder) and not exists:
        raise FileExistsError(f"{path} is a file: give the path of a folder, existing or not.")
    # The folder around an existing one may be on another file system, or not writable.
    beside = folder / "new" if exists else folder
    with temporary_folder(beside, wanted=path) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if not exists:
            new.rename(folder)
            return
        old.mkdir()
        names = os.listdir(new)
        leaving = [name for name in os.listdir(folder) if name in names or stale(name)]
        departures = [(folder / name, old / name) for name in leaving]
        departures.sort(key=lambda move: move[0].name not in last)
        arrivals = [(new / name, folder / name) for name in names]
        arrivals.sort(key=lambda move: move[0].name in last)
        rename_all(departures + arrivals)


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises errors of the block as errors of `path`, since nobody knows the temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder if it exists, so that an incomplete one never has its name."""
    path = Path(path)
    if path.exists():
        temporary = _temporary_path(path)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def rename_all(renames: Iterable[tuple[Path, Path]]) -> None:
    """Renames each first path to its second, in order; if one fails, the earlier ones are undone.

    Unlike a single rename, this is not atomic: a killed process leaves the renames made so far.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in renames:
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def leftover_of(name: str) -> str | None:
    """Returns the final name of a temporary file or folder, or `None` if `name` is not temporary.

    A temporary file or folder remains only if the process is killed while writing or removing.
    """
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found[1]


def _temporary_path(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    """Forces the content of a file, or the names in a folder, to disk."""
    # Windows cannot open folders.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
