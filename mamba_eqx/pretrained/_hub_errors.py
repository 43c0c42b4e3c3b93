"""Error messages for failures at the Hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..formats import CheckpointError, quote


_LOG_IN = "log in (`hf auth login`) or pass a `token`"
_USE_CACHE = ", or use the files in the cache with `local_files_only=True`"
# The types of errors that may wrap a more informative cause.
_WRAPPERS = (ValueError, RuntimeError)
_BUSY = (408, 429, 500, 502, 503, 504)
# What may be secret in the messages of other libraries: the password in an address, and a token.
_SECRETS = re.compile(r"(?<=//)[^/\s]*(?=@)|\bhf_[0-9A-Za-z]{16,}|(?<=Bearer )\S+|(?<=Basic )\S+")


class BadAnswer(Exception):
    """An answer of a Hub that cannot be right. The message is a sentence."""


def hide_secrets(text: str, secrets: Sequence[str] = ()) -> str:
    """Replaces tokens, names and passwords in addresses, and the given secrets by stars."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


@dataclass(frozen=True)
class Place:
    """A revision of a repository, as messages refer to it.

    - `secrets`: what no message may show, even if a server sends it back.
    """

    repository: str
    revision: str | None
    endpoint: str | None
    commit: str | None = None
    secrets: Sequence[str] = field(default=(), repr=False)

    def __str__(self) -> str:
        text = f"The repository {quote(self.repository)}"
        if self.revision is not None:
            text += f" at revision {quote(self.revision)}"
        if self.commit is not None and self.commit != self.revision:
            text += f" (commit {self.commit[:7]})"
        endpoint = self.endpoint and hide_secrets(self.endpoint)
        return f"{text} on the Hugging Face Hub" + (f" ({endpoint})" if endpoint else "")

    @property
    def page(self) -> str:
        return f"{hide_secrets(self.endpoint or 'https://huggingface.co')}/{self.repository}"


def is_absence(error: Exception) -> bool:
    """Returns whether an error of `huggingface_hub` means that a file does not exist, rather than
    that a request failed."""
    from huggingface_hub import errors

    is_local = isinstance(error, errors.LocalEntryNotFoundError)
    return isinstance(error, errors.EntryNotFoundError) and not is_local


def is_passing(error: Exception) -> bool:
    """Returns whether the same request may succeed later: the Hub is busy, or did not answer."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return is_busy(error)
    # A `BadAnswer`, an invalid name and a missing login will not change. Errors of the HTTP library
    # have no base class that all its versions share.
    return not isinstance(error, BadAnswer | ValueError | errors.LocalTokenNotFoundError)


def is_busy(error: Exception) -> bool:
    """Returns whether the Hub has answered that it cannot answer now."""
    from huggingface_hub import errors

    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code in _BUSY


def not_cached(place: Place) -> CheckpointError:
    """Returns the error for a repository that is not in the cache, where only that may be used."""
    return CheckpointError(
        f"{place} is not in the local cache, and the Hub was not contacted (`local_files_only`, "
        "`HF_HUB_OFFLINE`). There is no local folder of that name either. Load it once while "
        "online, or download it elsewhere and give the path of the folder."
    )


def failure(place: Place, error: Exception, *, writing: bool = False) -> CheckpointError:
    """Converts an error of `huggingface_hub` or of its HTTP library into one with a remedy.

    The result has the original error as its cause, unless that contains a password or a token.

    **Arguments:**

    - `place`: the repository.
    - `error`: the original error.
    - `writing`: whether the request was an upload.
    """
    from huggingface_hub import errors

    wrapped = isinstance(error, errors.LocalEntryNotFoundError) or type(error) in _WRAPPERS
    cause = error.__cause__ if wrapped and error.__cause__ is not None else error
    could_not = f"could not be {'written' if writing else 'read'}"
    instead = "" if writing or place.commit is None else _USE_CACHE
    # Only a name that is no local folder is looked up on the Hub.
    no_folder = "" if writing else " There is no local folder of that name either."
    match cause:
        case errors.GatedRepoError():
            what = (
                f"is gated: accept its licence at {place.page}, then {_LOG_IN} of the same account."
            )
        case errors.RepositoryNotFoundError():
            what = (
                f"does not exist, or is private.{no_folder} Check the name; if it is private, "
                f"{_LOG_IN}."
            )
        case errors.RevisionNotFoundError():
            what = f"does not exist: choose one of the branches and tags listed at {place.page}."
        case errors.DisabledRepoError():
            what = "has been disabled by the Hub: choose another one."
        case errors.HFValidationError():
            what = f"is neither a local folder nor a valid name: {cause}"
        case errors.LocalTokenNotFoundError():
            what = f"{could_not}, because `token=True` needs a login: {_LOG_IN}."
        case errors.OfflineModeIsEnabled() if writing:
            what = f"{could_not}: unset `HF_HUB_OFFLINE` to use the network."
        case BadAnswer():
            what = f"{could_not}: {cause} Try again; if the error persists, use another `endpoint`."
        case errors.HfHubHTTPError():
            what = _http_failure(cause.response.status_code, could_not, instead)
        case _ if place.commit is None and not writing:
            what = (
                f"{could_not}, since the Hub could not be reached: {_sentence(cause)}{no_folder} "
                "Check the name and the network, and try again."
            )
        case _:
            what = (
                f"{could_not}: {_sentence(cause)} Check the network and the disk, try "
                f"again{instead}."
            )
    made = CheckpointError(hide_secrets(f"{place} {what}", place.secrets))
    made.__cause__ = None if _has_secrets(error, place.secrets) else error
    made.__suppress_context__ = True
    return made


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


def _has_secrets(error: BaseException | None, secrets: Sequence[str]) -> bool:
    """Returns whether an error or one of those that led to it shows a secret in its message."""
    while error is not None:
        text = f"{error} {error!r}"
        if hide_secrets(text, secrets) != text:
            return True
        error = error.__cause__ or error.__context__
    return False
