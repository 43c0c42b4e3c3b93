"""Checkpoints on the Hugging Face Hub."""

import os
from pathlib import Path

from ._files import CONFIG, Find
from ._stored import CheckpointError


def find_on_hub(
    repository: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Find:
    """A function that downloads the files of a repository one by one, or finds them in the cache.

    The first file settles the revision: all others are of the very same commit, whatever is
    pushed meanwhile.

    **Raises:** `CheckpointError` if the repository has no config, or cannot be reached.
    """
    # Here, because it takes long to import and local checkpoints do without.
    from huggingface_hub import errors, hf_hub_download

    def download(name: str, revision: str | None) -> Path:
        try:
            path = hf_hub_download(
                repository,
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
            )
        except errors.EntryNotFoundError:
            raise
        except errors.GatedRepoError:
            raise _failure(
                repository, "is gated: accept its terms on its page, and pass a `token`."
            ) from None
        except errors.RepositoryNotFoundError:
            raise _failure(
                repository,
                "does not exist, or is private. Check the name, or pass a `token`. (There is no "
                "local folder of that name either.)",
            ) from None
        except errors.RevisionNotFoundError:
            raise _failure(repository, f"has no revision {revision!r}.") from None
        except errors.HFValidationError as error:
            raise _failure(
                repository, f"is neither a local folder nor a valid name: {error}"
            ) from (None)
        except (OSError, errors.OfflineModeIsEnabled) as error:
            raise _failure(repository, f"could not be read ({error}). Try again.") from error
        return Path(path)

    def find(name: str) -> Path | None:
        try:
            return download(name, commit)
        except errors.EntryNotFoundError:
            return None

    try:
        config = download(CONFIG, revision)
    except errors.LocalEntryNotFoundError as error:
        raise _failure(
            repository,
            "is not in the local cache, and the Hub was not asked (`local_files_only`, "
            "`HF_HUB_OFFLINE`) or not reached. Load it once while online, or download it elsewhere "
            "and give the path of the folder.",
        ) from error
    except errors.EntryNotFoundError:
        raise _failure(repository, f"has no {CONFIG}: it is not a model's.") from None
    commit = config.parent.name
    return find


def _failure(repository: str, what: str) -> CheckpointError:
    return CheckpointError(f"The repository {repository!r} on the Hugging Face Hub {what}")
