"""Checkpoints on the Hugging Face Hub, downloaded and cached by `huggingface_hub`.

`huggingface_hub` is imported inside the functions that need it, because its import is slow and
local checkpoints do not need it.
"""

import dataclasses
import enum
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..formats import CheckpointError, quote
from ._hub_errors import Place, failure, is_absence


_FIRST_READ = 2**17
_LARGEST_HEADER = 2**23  # Twice the largest header that `open_safetensors` accepts.
_TIMEOUT = 30  # In seconds.
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Hub:
    """The options for access to the Hub, with the names that `huggingface_hub` uses.

    See [`mamba_eqx.from_pretrained`][] for their meanings.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    endpoint: str | None = None

    def __post_init__(self):
        if self.force_download and self.local_files_only:
            raise ValueError(
                "`force_download` and `local_files_only` exclude each other. Set only one of them."
            )

    @property
    def cache(self) -> Path | None:
        """The folder for downloads, or `None` for the usual cache."""
        return None if self.cache_dir is None else Path(self.cache_dir)

    @property
    def offline(self) -> bool:
        """Whether only the cache may be used."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


def open_repository(
    repository: str, hub: Hub, entry_files: Sequence[str], header_folder: Path | None = None
) -> "_Repository":
    """Opens a repository, whose files are then downloaded one by one or found in the cache.

    The first file found resolves the revision to a commit. All other files are taken from the same
    commit, even if newer commits are pushed meanwhile.

    **Arguments:**

    - `repository`: the name, `owner/name`.
    - `hub`: the options for access to the Hub.
    - `entry_files`: names of files, of which the repository must have at least one. The first that
        exists resolves the revision.
    - `header_folder`: a folder. If given, safetensors files that are not in the cache are not
        downloaded. Only their headers, which describe the tensors, are written to this folder, as
        files of the full size that contain zeros for the values.

    **Raises:** `CheckpointError` if the repository has none of `entry_files` or cannot be read.
    """
    place = Place(repository, hub.revision, hub.endpoint)
    found = (_fetch(place, name, hub) for name in entry_files)
    entry = next((path for path in found if path is not None), None)
    if entry is None:
        raise CheckpointError(
            f"{place} has no {entry_files[0]}: it is not a model repository, or its layout is not "
            "supported. Check the name and the revision."
        )
    commit = entry.parent.name
    return _Repository(
        dataclasses.replace(place, commit=commit),
        dataclasses.replace(hub, revision=commit),
        entry,
        header_folder,
    )


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A `Source` of the files of one commit.

    - `place`, `hub`: the repository, and the options for access to it at the commit.
    - `entry`: the file that resolved the revision.
    - `header_folder`: see `open_repository`.
    """

    place: Place
    hub: Hub
    entry: Path
    header_folder: Path | None

    @property
    def where(self) -> str:
        where = str(self.place)
        if self.hub.offline:
            return f"The cached part of {where[0].lower()}{where[1:]}"
        return where

    def find(self, name: str) -> Path | None:
        if name == self.entry.name:
            return self.entry
        folder = self.header_folder
        if folder is None or not name.endswith(".safetensors") or self.hub.offline:
            return _fetch(self.place, name, self.hub)
        match _look_up(self.place.repository, name, self.hub):
            case _Miss.UNKNOWN:
                return _fetch_header(self.place, name, self.hub, folder)
            case _Miss.ABSENT:
                return None
            case path:
                return path


def _fetch(place: Place, name: str, hub: Hub) -> Path | None:
    """Returns the path of a file in the cache, downloading and verifying the file if necessary.

    **Returns:**

    The path, or `None` if the repository does not have the file.

    **Raises:** `CheckpointError` if the download fails, or the checksum does not match.
    """
    from huggingface_hub import hf_hub_download

    cached = _Miss.UNKNOWN
    if not hub.force_download:
        cached = _look_up(place.repository, name, hub)
        if cached is _Miss.ABSENT:
            return None
        if isinstance(cached, Path) and _COMMIT.fullmatch(hub.revision or ""):
            return cached
    try:
        path = hf_hub_download(
            place.repository,
            name,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache,
            local_files_only=hub.local_files_only,
            force_download=hub.force_download,
            endpoint=hub.endpoint,
        )
    # The errors of `huggingface_hub` have no common base class, and those of its HTTP library,
    # which has changed twice, are not wrapped.
    except Exception as error:
        if is_absence(error, offline=place.commit is not None and hub.offline):
            return None
        raise failure(place, error) from error
    path = Path(path)
    if path == cached:
        return path
    try:
        mismatch = _checksum_mismatch(path, place, hub)
    except BaseException:
        _remove_from_cache(path)
        raise
    if mismatch is None:
        return path
    _remove_from_cache(path)
    if path.parent.name != hub.revision:
        # `huggingface_hub` requests the commit first and then the file by the name of the branch.
        # The branch may have moved in between.
        return _fetch(place, name, dataclasses.replace(hub, revision=path.parent.name))
    raise CheckpointError(
        f"{place}: {quote(name)} does not have the checksum that the Hub announced ({mismatch}). "
        "It has been removed from the cache. Load the checkpoint again; if the error persists, "
        "something between here and the Hub alters files."
    )


def _fetch_header(place: Place, name: str, hub: Hub, folder: Path) -> Path | None:
    """Downloads the header of a safetensors file into `folder`; see `open_repository`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(place.repository, name, revision=hub.revision, endpoint=hub.endpoint)

    def read(end: int) -> bytes:
        headers = build_hf_headers(token=hub.token) | {"Range": f"bytes=0-{end - 1}"}
        response = get_session().get(url, headers=headers, timeout=_TIMEOUT)
        hf_raise_for_status(response)
        return response.content[:end]

    try:
        size = get_hf_file_metadata(url, token=hub.token).size or 0
        head = read(min(size, _FIRST_READ))
        needed = min(size, 8 + int.from_bytes(head[:8], "little"))
        if len(head) < needed <= _LARGEST_HEADER:
            head = read(needed)
    except Exception as error:  # Any type, as in `_fetch`.
        if is_absence(error, offline=False):
            return None
        raise failure(place, error) from error
    path = folder / name
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)  # The zeros beyond the header take no space on disk.
    return path


class _Miss(enum.Enum):
    """Why a file is not in the cache."""

    ABSENT = "the commit is known not to have the file"
    UNKNOWN = "the file has not been requested"


def _look_up(repository: str, name: str, hub: Hub) -> Path | _Miss:
    """Looks up a file in the cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, name, revision=hub.revision, cache_dir=hub.cache)
    except ValueError:
        # The name of the repository is not valid; the download reports it.
        return _Miss.UNKNOWN
    if isinstance(found, str):
        return Path(found)
    # A commit never gains a file, but a branch may have gained it since.
    is_commit = _COMMIT.fullmatch(hub.revision or "")
    return _Miss.ABSENT if found is not None and is_commit else _Miss.UNKNOWN


def _checksum_mismatch(path: Path, place: Place, hub: Hub) -> str | None:
    """Compares a downloaded file with the checksum that the Hub announced.

    `huggingface_hub` compares the size only. Files that were in the cache before are not verified,
    because reading them would add seconds to every load of a large model.

    **Returns:**

    A description of the mismatch, or `None` if there is none.
    """
    etag = _announced_checksum(path, place, hub)
    if _SHA256.fullmatch(etag):
        # The id of a large file, in any kind of storage.
        with open(path, "rb") as file:
            kind, found = "sha256", hashlib.file_digest(file, "sha256").hexdigest()
    elif _COMMIT.fullmatch(etag):
        # The id of any other file, which is a git blob.
        kind, content = "git checksum", path.read_bytes()
        header = b"blob %d\0" % len(content)
        found = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    else:
        return None
    return None if found == etag else f"the {kind} is {found}, and should be {etag}"


def _announced_checksum(path: Path, place: Place, hub: Hub) -> str:
    if path.is_symlink():
        # The cache names the target after the checksum that the Hub announced.
        return Path(os.readlink(path)).name
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    commit = path.parent.name
    url = hf_hub_url(place.repository, path.name, revision=commit, endpoint=hub.endpoint)
    try:
        return get_hf_file_metadata(url, token=hub.token).etag or ""
    except Exception as error:
        raise failure(place, error) from error


def _remove_from_cache(path: Path) -> None:
    files = [path]
    if path.is_symlink():
        files.append(path.parent / os.readlink(path))
    for file in files:
        file.unlink(missing_ok=True)
