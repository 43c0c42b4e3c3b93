"""Checkpoints on the Hugging Face Hub, downloaded into the cache of `huggingface_hub`.

`huggingface_hub` is imported inside the functions that need it, because its import is slow and
local checkpoints do not need it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..formats import CheckpointError, is_plain_name, quote
from ._hub_cache import Cache
from ._hub_errors import (
    BadAnswer,
    Place,
    failure,
    is_absence,
    is_busy,
    is_passing,
    not_cached,
)
from ._hub_options import Hub as Hub
from ._hub_requests import Answer, ask, fetch, fetch_beginning


_FIRST_READ = 2**17
_LARGEST_HEADER = 2**23  # Twice the largest header that `open_safetensors` accepts.


def open_repository(
    repository: str, hub: Hub, entry_files: Sequence[str], header_folder: Path | None = None
) -> "_Repository":
    """Opens a repository, whose files are then downloaded one by one or found in the cache.

    The first file found resolves the revision to a commit. All other files are taken from the same
    commit, even if newer commits are pushed meanwhile.

    If the Hub cannot be reached from the beginning, the files in the cache are used. A Hub that has
    answered once has to answer to the end, so that a passing failure is never taken for the absence
    of a file.

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
    place = Place(repository, hub.revision, hub.shown_endpoint, secrets=hub.secrets)
    try:
        cache = Cache(hub.cache, _folder_name(repository))
        commit = cache.commit(hub.revision or "main")
    except Exception as error:  # The name is not valid, or the cache cannot be read.
        failed = failure(place, error)
        raise failed from failed.__cause__
    opened = _Repository(place, hub, cache, header_folder, known=commit)
    if hub.offline and commit is None:
        raise not_cached(place)
    if all(opened.find(name) is None for name in entry_files):
        if hub.offline:
            raise not_cached(place)
        if opened.unreachable is not None:
            raise failure(place, opened.unreachable)
        raise CheckpointError(
            f"{place} has no {entry_files[0]}: it is not a model repository, or its layout is not "
            "supported. Check the name and the revision."
        )
    return opened


@dataclasses.dataclass
class _Repository:
    """A `Source` of the files of one commit.

    - `place`, `hub`: the repository, and the options for access to it.
    - `cache`: the folder for its files.
    - `header_folder`: see `open_repository`.
    - `known`: the commit of the revision as far as the cache knows it.
    - `answered`: whether the Hub has answered.
    - `unreachable`: the error of the first request, if the Hub cannot be reached.
    - `found`: the files found so far.
    """

    place: Place
    hub: Hub
    cache: Cache
    header_folder: Path | None
    known: str | None
    answered: bool = False
    unreachable: Exception | None = None
    found: dict[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> str:
        where = str(self.place)
        if self.hub.offline or self.unreachable is not None:
            where = f"The cached part of {where[0].lower()}{where[1:]}"
        return where if self.unreachable is None else f"{where}, which cannot be reached,"

    def find(self, name: str) -> Path | None:
        if name not in self.found:
            try:
                path = self._find(name)
            except Exception as error:  # Of any type; see `failure`.
                if is_absence(error):
                    self.answered = True
                    if self.place.commit is not None:
                        self.cache.set_absent(self.place.commit, name)
                    return None
                failed = failure(self.place, error)
                raise failed from failed.__cause__
            if path is None:
                return None
            self.found[name] = path
        return self.found[name]

    def _find(self, name: str) -> Path | None:
        if not is_plain_name(name):
            raise BadAnswer(f"{quote(name)} is not the plain name of a file.")
        cached = None if self.known is None else self.cache.find(self.known, name)
        if self.hub.offline or self.unreachable is not None:
            return self._from_cache(cached)
        forced, commit = self.hub.force_download, self.place.commit
        # A revision that the cache knows under its own name is a commit, which never changes.
        is_fixed = commit is not None or self.known == self.hub.revision
        if cached is not None and is_fixed and not forced:
            return self._from_cache(cached)
        if commit is not None and not forced and self.cache.is_absent(commit, name):
            return None
        can_do_without = self.known is not None and not self.answered and not forced
        if self.answered:
            may_repeat = is_passing
        else:
            # A Hub that does not answer at all is not there, or there is no network.
            may_repeat = is_busy if cached is None or forced else lambda error: False
        try:
            answer = ask(self.hub, self._url(name), may_repeat)
        except Exception as error:
            if not (can_do_without and is_passing(error)):
                raise
            self.unreachable = error
            return self._from_cache(cached)
        self.answered = True
        if commit is None:
            self._set_commit(answer.commit)
        elif answer.commit != commit:
            raise BadAnswer(f"{quote(name)} belongs to another commit, {quote(answer.commit)}.")
        return self._download(name, answer)

    def _from_cache(self, cached: Path | None) -> Path | None:
        if cached is not None and self.known is not None:
            self._set_commit(self.known)
        return cached

    def _set_commit(self, commit: str) -> None:
        self.known = commit
        self.place = dataclasses.replace(self.place, commit=commit)

    def _download(self, name: str, answer: Answer) -> Path | None:
        path = self.cache.find(answer.commit, name)
        if path is None or self.hub.force_download:
            if self.header_folder is not None and name.endswith(".safetensors"):
                return self._fetch_header(name, answer, self.header_folder)
            download: Callable[[Path], None]
            download = lambda path: fetch(self.hub, self._url(name), path, size=answer.size)
            path = self.cache.add(name, answer, download, force=self.hub.force_download)
        self.cache.set_commit(self.hub.revision or "main", answer.commit)
        return path

    def _fetch_header(self, name: str, answer: Answer, folder: Path) -> Path:
        """Downloads the header of a safetensors file into `folder`; see `open_repository`."""
        size = answer.size
        if size is None:
            raise BadAnswer(f"the answer for {quote(name)} does not tell its size.")
        url, path = self._url(name), folder / name
        head = fetch_beginning(self.hub, url, path, min(size, _FIRST_READ))
        needed = min(size, 8 + int.from_bytes(head[:8], "little"))
        if len(head) < needed <= _LARGEST_HEADER:
            fetch_beginning(self.hub, url, path, needed)
        with open(path, "r+b") as file:
            file.truncate(size)  # The zeros beyond the header take no space on disk.
        return path

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        revision = self.place.commit or self.hub.revision
        address = self.hub.address
        return hf_hub_url(self.place.repository, name, revision=revision, endpoint=address)


def _folder_name(repository: str) -> str:
    """Returns the name of a repository's folder in the cache.

    **Raises:** `HFValidationError` if the name of the repository is not valid.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    return "--".join(["models", *repository.split("/")])
