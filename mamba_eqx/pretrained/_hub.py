"""Checkpoints on the Hugging Face Hub: downloads, and the cache, are those of `huggingface_hub`.

`huggingface_hub` is imported where it is used, because it takes long and local checkpoints do
without.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..formats import CheckpointError, quote
from ._hub_errors import Place, failure, is_absence
from ._source import Find


@dataclasses.dataclass(frozen=True)
class Hub:
    """How to get at the Hub: options of `huggingface_hub`, by its names."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    endpoint: str | None = None

    def __post_init__(self):
        if self.force_download and self.local_files_only:
            raise ValueError("`force_download` and `local_files_only` exclude each other.")

    @property
    def cache(self) -> Path | None:
        return None if self.cache_dir is None else Path(self.cache_dir)


def find_on_hub(
    repository: str, hub: Hub, configs: Sequence[str], heads: Path | None = None
) -> tuple[Find, str]:
    """A function that downloads the files of a repository one by one, or finds them in the cache.

    The first file settles the revision: all others are of the very same commit, whatever is
    pushed meanwhile.

    **Arguments:**

    - `configs`: the names that a config may have; the first that is there settles the revision.
    - `heads`: a folder. If given, safetensors that are not in the cache are not downloaded, but
        for their beginnings, which describe the tensors: they are put there, as files of the right
        size with nothing but zeros behind.

    **Returns:** the function, and what to call the checkpoint in messages.

    **Raises:** `CheckpointError` if the repository has no config, or cannot be reached.
    """
    place = Place(repository, hub.revision, hub.endpoint)
    found = (_fetch(place, name, hub) for name in configs)
    config = next((path for path in found if path is not None), None)
    if config is None:
        raise CheckpointError(
            f"{place} has no {configs[0]}: it is not a model's, or of another kind."
        )
    commit = config.parent.name
    pinned = dataclasses.replace(hub, revision=commit)
    place = dataclasses.replace(place, commit=commit)

    def find(name: str) -> Path | None:
        if name == config.name:
            return config
        if heads is None or not name.endswith(".safetensors") or _is_offline(hub):
            return _fetch(place, name, pinned)
        cached = _in_cache(repository, name, pinned)
        if cached is None:
            return _fetch_head(place, name, pinned, heads)
        return cached if isinstance(cached, Path) else None

    where = str(place)
    if _is_offline(hub):
        where = f"What the cache has of {where[0].lower()}{where[1:]}"
    return find, where


def _is_offline(hub: Hub) -> bool:
    from huggingface_hub import constants

    return hub.local_files_only or constants.HF_HUB_OFFLINE


def _fetch(place: Place, name: str, hub: Hub) -> Path | None:
    """Where the file is, after a download if need be; `None` if the repository does not have it.

    **Arguments:**

    - `place`: what to call the repository at that revision in messages.
    """
    from huggingface_hub import hf_hub_download

    cached = None if hub.force_download else _in_cache(place.repository, name, hub)
    if isinstance(cached, Path) and _COMMIT.fullmatch(hub.revision or ""):
        return cached
    if cached is not None and not isinstance(cached, Path):
        return None  # Known from before: a commit does not change.
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
    # Any: its errors have no common ancestor, and those of its HTTP library, which has changed
    # twice, come through.
    except Exception as error:
        if is_absence(error, offline=place.commit is not None and _is_offline(hub)):
            return None
        raise failure(place, error) from error
    path = Path(path)
    if path == cached:
        return path
    try:
        fault = _fault(path, place, hub)
    except BaseException:
        _forget(path)
        raise
    if fault is None:
        return path
    _forget(path)
    if path.parent.name != hub.revision:
        # `huggingface_hub` asks for the commit, and then for the file by the name of the branch,
        # to which someone may have pushed in between.
        return _fetch(place, name, dataclasses.replace(hub, revision=path.parent.name))
    raise CheckpointError(
        f"{place}: {quote(name)} came with other bytes than the Hub announced ({fault}). It has "
        "been removed from the cache again. Load once more; if that does not help, something "
        "between here and the Hub alters files."
    )


def _fetch_head(place: Place, name: str, hub: Hub, folder: Path) -> Path | None:
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
        if len(head) < needed <= _LARGEST_HEAD:
            head = read(needed)
    except Exception as error:  # Any: see above.
        if is_absence(error, offline=False):
            return None
        raise failure(place, error) from error
    path = folder / name
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)  # Takes no room on the disk.
    return path


_FIRST_READ = 2**17
_LARGEST_HEAD = 2**23  # Twice what is read of one.
_TIMEOUT = 30
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")


def _in_cache(repository: str, name: str, hub: Hub) -> Path | object | None:
    """Where the file is; something else if it is known not to exist; `None` if nothing is known."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, name, revision=hub.revision, cache_dir=hub.cache)
    except ValueError:  # Not the name of a repository, as the download will say.
        return None
    if isinstance(found, str):
        return Path(found)
    # A branch may have got the file meanwhile.
    return found if _COMMIT.fullmatch(hub.revision or "") else None


def _fault(path: Path, place: Place, hub: Hub) -> str | None:
    """In what the checksum of a file that has just been downloaded differs from the one announced.

    `huggingface_hub` compares the size only. A file that was in the cache before is not read
    again: that would take seconds for each load of a large model.
    """
    etag = _checksum(path, place, hub)
    if _SHA256.fullmatch(etag):
        # Of large files, wherever they are kept.
        with open(path, "rb") as file:
            kind, found = "sha256", hashlib.file_digest(file, "sha256").hexdigest()
    elif _COMMIT.fullmatch(etag):
        # Of all others: git's name for a blob.
        kind, content = "git checksum", path.read_bytes()
        header = b"blob %d\0" % len(content)
        found = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    else:
        return None
    return None if found == etag else f"the {kind} is {found}, and should be {etag}"


def _checksum(path: Path, place: Place, hub: Hub) -> str:
    if path.is_symlink():
        # The cache names the file itself by the checksum that the Hub announced.
        return Path(os.readlink(path)).name
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    commit = path.parent.name
    url = hf_hub_url(place.repository, path.name, revision=commit, endpoint=hub.endpoint)
    try:
        return get_hf_file_metadata(url, token=hub.token).etag or ""
    except Exception as error:
        raise failure(place, error) from error


def _forget(path: Path) -> None:
    files = [path]
    if path.is_symlink():
        files.append(path.parent / os.readlink(path))
    for file in files:
        file.unlink(missing_ok=True)
