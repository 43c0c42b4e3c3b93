"""The cache of `huggingface_hub`: where the files of a repository are, and adding one.

    models--owner--name/refs/main                    the commit that a branch or tag was last at
    models--owner--name/snapshots/<commit>/<name>    a link to one of the following, or a file
    models--owner--name/blobs/<checksum>             the content of a file
    models--owner--name/.no_exist/<commit>/<name>    an empty file, if the commit has no such file

Files are added here, rather than by `hf_hub_download`, since that trusts the names that a server
gives: a checksum or a commit could lead out of the cache.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..formats import quote
from ._hub_errors import BadAnswer
from ._hub_requests import IDENTIFIER, Answer


_GIT_CHECKSUM = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_WEIGHTS = (".safetensors", ".bin", ".index.json")
_LOCK_TIME = 600  # In seconds.


@dataclass(frozen=True)
class Cache:
    """The part of the cache that holds one repository.

    - `root`: the folder of the whole cache.
    - `name`: the name of the repository's folder within.
    """

    root: Path
    name: str

    def commit(self, revision: str) -> str | None:
        """Returns the commit of a revision, as far as the cache knows it."""
        if (self._folder / "snapshots" / revision).is_dir():
            return revision
        path = self._folder / "refs" / revision
        if not path.is_file() or path.stat().st_size > 200:
            return None
        commit = path.read_text("utf-8", "replace").strip()
        return commit if IDENTIFIER.fullmatch(commit) else None

    def find(self, commit: str, name: str) -> Path | None:
        """Returns the path of a file of a commit, or `None` if it is not in the cache."""
        path = self._pointer(commit, name)
        return path if path.is_file() else None

    def is_absent(self, commit: str, name: str) -> bool:
        """Returns whether a commit is known to have its weights in other files than this one.

        A file that was not found once may only have been hidden by a passing failure. This is
        therefore believed of weights only, and only if the cache has others of the same commit.
        """
        snapshot = self._folder / "snapshots" / commit
        return (
            name.endswith(_WEIGHTS)
            and (self._folder / ".no_exist" / commit / name).is_file()
            and snapshot.is_dir()
            and any(other.endswith(_WEIGHTS) for other in os.listdir(snapshot))
        )

    def set_absent(self, commit: str, name: str) -> None:
        """Records that a commit has no file of a name, if the cache can be written to."""
        path = self._folder / ".no_exist" / commit / name
        if name.endswith(_WEIGHTS):
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    def add(
        self,
        name: str,
        answer: Answer,
        download: Callable[[Path], None],
        *,
        force: bool,
    ) -> Path:
        """Adds a file, unless its content is in the cache.

        **Arguments:**

        - `name`: the name of the file in its repository.
        - `answer`: the description of the file. Its commit and its checksum are plain names.
        - `download`: writes the content to a path. It is verified there, and moved into the cache
            only if it is right.
        - `force`: whether to download even what is in the cache.

        **Raises:** `BadAnswer` if the content does not have the checksum that was announced; the
        errors of `download` and of the disk.
        """
        from huggingface_hub import file_download

        pointer, blobs = self._pointer(answer.commit, name), self._folder / "blobs"
        for folder in (blobs, pointer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        _check_room(blobs, name, answer.size)
        links = file_download.are_symlinks_supported(self.root)
        target = blobs / answer.etag if links else pointer
        with self._lock(answer.etag):
            if force or not target.is_file():
                with tempfile.TemporaryDirectory(dir=blobs, suffix=".incomplete") as folder:
                    path = Path(folder) / "content"
                    download(path)
                    _verify(path, name, answer.etag)
                    os.replace(path, target)
            if links:
                _link(target, pointer)
        return pointer

    def set_commit(self, revision: str, commit: str) -> None:
        """Records the commit of a branch or tag, if the cache can be written to."""
        path = self._folder / "refs" / revision
        if revision == commit or self.commit(revision) == commit:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                new = Path(folder) / "ref"
                new.write_text(commit, "utf-8")
                os.replace(new, path)

    @property
    def _folder(self) -> Path:
        return self.root / self.name

    def _pointer(self, commit: str, name: str) -> Path:
        return self._folder / "snapshots" / commit / name

    @contextlib.contextmanager
    def _lock(self, etag: str) -> Iterator[None]:
        """Lets one process at a time download a file, so that the others need not.

        Nothing else depends on the lock, so that nobody waits for it for ever.
        """
        from huggingface_hub.utils import WeakFileLock

        path = self.root / ".locks" / self.name / f"{etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(TimeoutError):
                stack.enter_context(WeakFileLock(path, timeout=_LOCK_TIME))
            yield


def _check_room(folder: Path, name: str, size: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise OSError(
            f"{quote(name)} has {size} bytes, but the disk with {folder} has room for {free}. Free "
            "some, or use a `cache_dir` on another disk."
        )


def _verify(path: Path, name: str, etag: str) -> None:
    """Compares a downloaded file with the checksum that the Hub announced.

    Files that were in the cache before are not verified, because reading them would add seconds to
    every load of a large model.
    """
    if _SHA256.fullmatch(etag):
        # The id of a large file, in any kind of storage.
        kind, start = "sha256", hashlib.sha256()
    elif _GIT_CHECKSUM.fullmatch(etag):
        # The id of any other file, which is a git blob.
        header = b"blob %d\0" % path.stat().st_size
        kind, start = "git checksum", hashlib.sha1(header, usedforsecurity=False)
    else:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, start.copy).hexdigest()
    if found != etag:
        raise BadAnswer(
            f"{quote(name)} does not have the checksum that the Hub announced (the {kind} is "
            f"{found}, and should be {etag}), and has been removed. Something between here and the "
            "Hub may alter files."
        )


def _link(target: Path, pointer: Path) -> None:
    """Makes `pointer` a link to `target`, in one step."""
    with tempfile.TemporaryDirectory(dir=pointer.parent) as folder:
        link = Path(folder) / "link"
        link.symlink_to(os.path.relpath(target, pointer.parent))
        os.replace(link, pointer)
