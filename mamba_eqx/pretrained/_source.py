"""The source of a checkpoint's files: a local folder, or a repository on the Hub."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..formats import CheckpointError, quote
from ._hub import Hub, open_repository
from .layouts import MISTRAL


CONFIG = "config.json"
CONFIGS = (CONFIG, MISTRAL.config_file)


@runtime_checkable
class Source(Protocol):
    """The files of one checkpoint, found by name.

    - `where`: how messages refer to the checkpoint.
    """

    @property
    def where(self) -> str: ...

    def find(self, name: str) -> Path | None:
        """Returns the local path of a file, downloaded if necessary, or `None` if it is absent."""
        ...


def open_source(
    name_or_path: str | os.PathLike[str],
    hub: Hub,
    *,
    entry_files: Sequence[str] = CONFIGS,
    header_folder: Path | None = None,
) -> Source:
    """Opens a local folder, or else a repository on the Hub.

    **Arguments:**

    - `name_or_path`: a local folder, or the name of a repository.
    - `hub`: the options for access to the Hub.
    - `entry_files`, `header_folder`: options for a repository; see `open_repository`.

    **Raises:** `FileNotFoundError` if a path does not exist; `CheckpointError` if it is a file, or
    the repository cannot be read or has none of `entry_files`.
    """
    if not isinstance(name_or_path, str | os.PathLike) or name_or_path == "":
        raise ValueError(
            "`name_or_path` must be the folder of a checkpoint or the name of a repository, but "
            f"got {name_or_path!r}."
        )
    folder = Path(name_or_path)
    if not _holds(folder, Path.is_dir) and not _is_path(name_or_path):
        return open_repository(str(name_or_path), hub, entry_files, header_folder)
    if not _holds(folder, Path.exists):
        raise FileNotFoundError(
            f"There is no folder {quote(str(folder))}. Give the folder of a checkpoint, or the "
            "name of a repository on the Hugging Face Hub."
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file: give the folder that holds it, with its {CONFIG}."
        )
    return _Folder(os.fspath(name_or_path), folder, hub)


def may_be_there(name_or_path: str) -> bool:
    """Returns whether something is at a path. A name of a repository always may be on the Hub."""
    return not _is_path(name_or_path) or _holds(Path(name_or_path), Path.exists)


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether the argument cannot be a repository's name (`name` or `owner/name`)."""
    if not isinstance(name_or_path, str):
        return True
    return (
        name_or_path.startswith((".", "/", "~"))
        or "\\" in name_or_path
        or name_or_path.count("/") > 1
        or name_or_path.endswith("/")
        or _holds(Path(name_or_path), Path.exists)
    )


def _holds(path: Path, condition: Callable[[Path], bool]) -> bool:
    """Returns whether a path meets a condition. A path that is not possible meets none."""
    try:
        return condition(path)
    except (OSError, ValueError):  # The name is too long, or contains a NUL.
        return False


@dataclass(frozen=True)
class _Folder:
    """A `Source` of the files in a local folder."""

    where: str
    path: Path
    hub: Hub

    def find(self, name: str) -> Path | None:
        path = self.path / name
        try:
            if not path.exists():
                return None
            # A link in an untrusted folder must not make us read files outside the folder.
            target = path.resolve()
            stays = any(target.is_relative_to(root.resolve()) for root in self._roots())
        except (OSError, ValueError, RuntimeError) as error:  # The last for a loop of links.
            raise CheckpointError(
                f"{quote(name)} in {self.path} cannot be read: {error}. Download or save the "
                "checkpoint again."
            ) from error
        if not stays and not self._is_cached(target):
            raise CheckpointError(
                f"{path} is a link that leaves the folder: replace the link by a copy of its "
                "target, or give the folder that holds the target."
            )
        if not target.is_file():
            # Reading a named pipe or a device could take for ever.
            raise CheckpointError(
                f"{path}: it is not a regular file: replace it by a regular file."
            )
        return path

    def _roots(self) -> list[Path]:
        """Returns the folders that links may lead to."""
        snapshots = self.path.absolute().parent
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            # The Hub's cache keeps the content in a folder of the repository, or in a shared one.
            return [self.path, repository / "blobs", repository.parent / "blobs"]
        return [self.path]

    def _is_cached(self, target: Path) -> bool:
        """Returns whether a file is the content of a model in the user's own cache of the Hub.

        Folders that older versions of `huggingface_hub` made, with their option `local_dir`, have
        links there.
        """
        cache = self.hub.cache.resolve()
        blobs = target.parent
        repository = blobs.parent
        in_repository = repository.parent == cache and repository.name.startswith("models--")
        return blobs.name == "blobs" and in_repository
