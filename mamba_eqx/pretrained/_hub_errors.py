"""Error messages for failures at the Hub."""

from dataclasses import dataclass

from ..formats import CheckpointError, quote


_LOG_IN = "log in (`hf auth login`) or pass a `token`"
_USE_CACHE = ", or use the files in the cache with `local_files_only=True`"
# The types of errors that may wrap a more informative cause.
_WRAPPERS = (ValueError, RuntimeError)


@dataclass(frozen=True)
class Place:
    """A revision of a repository, as messages refer to it."""

    repository: str
    revision: str | None
    endpoint: str | None
    commit: str | None = None

    def __str__(self) -> str:
        text = f"The repository {quote(self.repository)}"
        if self.revision is not None:
            text += f" at revision {quote(self.revision)}"
        if self.commit is not None and self.commit != self.revision:
            text += f" (commit {self.commit[:7]})"
        return f"{text} on the Hugging Face Hub" + (f" ({self.endpoint})" if self.endpoint else "")

    @property
    def page(self) -> str:
        return f"{self.endpoint or 'https://huggingface.co'}/{self.repository}"


def is_absence(error: Exception, *, offline: bool) -> bool:
    """Returns whether an error means that a file does not exist, rather than that a request failed.

    **Arguments:**

    - `error`: an error of `huggingface_hub`.
    - `offline`: whether only the cache is used. A file that is not cached then counts as absent.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return offline
    return isinstance(error, errors.EntryNotFoundError)


def failure(place: Place, error: Exception, *, writing: bool = False) -> CheckpointError:
    """Converts an error of `huggingface_hub` or of its HTTP library into one with a remedy.

    **Arguments:**

    - `place`: the repository.
    - `error`: the original error.
    - `writing`: whether the request was an upload.
    """
    from huggingface_hub import errors

    wrapped = isinstance(error, errors.LocalEntryNotFoundError) or type(error) in _WRAPPERS
    cause = error.__cause__ if wrapped and error.__cause__ is not None else error
    could_not = f"could not be {'written' if writing else 'read'}"
    instead = "" if writing else _USE_CACHE
    match cause:
        case errors.GatedRepoError():
            what = (
                f"is gated: accept its licence at {place.page}, then {_LOG_IN} of the same account."
            )
        case errors.RepositoryNotFoundError():
            what = f"does not exist, or is private. Check the name; if it is private, {_LOG_IN}."
            if not writing:
                what += " (There is no local folder of that name either.)"
        case errors.RevisionNotFoundError():
            what = f"does not exist: choose one of the branches and tags listed at {place.page}."
        case errors.DisabledRepoError():
            what = "has been disabled by the Hub: choose another one."
        case errors.HFValidationError():
            what = f"is neither a local folder nor a valid name: {cause}"
        case errors.OfflineModeIsEnabled() if writing:
            what = f"{could_not}: unset `HF_HUB_OFFLINE` to use the network."
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            what = (
                "is not in the local cache, and the Hub was not contacted (`local_files_only`, "
                "`HF_HUB_OFFLINE`). Load it once while online, or download it elsewhere and give "
                "the path of the folder."
            )
        case errors.HfHubHTTPError():
            what = _http_failure(cause.response.status_code, could_not, instead)
        case _:
            what = (
                f"{could_not}: {_sentence(cause)} Check the network and the disk, try "
                f"again{instead}."
            )
    return CheckpointError(f"{place} {what}")


def _http_failure(status: int, could_not: str, instead: str) -> str:
    match status:
        case 401:
            return (
                "was refused, because the token is not valid (401): log in again "
                "(`hf auth login`), pass another `token`, or `token=False` for none."
            )
        case 403:
            return (
                "was refused, because the token does not permit it (403): give the token that "
                "permission in your settings on the Hub, or pass another `token`."
            )
        case 429:
            return (
                f"{could_not}: there were too many requests (429). Wait some minutes, {_LOG_IN} "
                f"for a higher limit{instead}."
            )
        case _:
            return f"{could_not}: the Hub answered with status {status}. Try again later{instead}."


def _sentence(error: BaseException) -> str:
    """Returns the message of an error, which may have several lines, as one sentence."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
