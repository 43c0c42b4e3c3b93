"""The error of a training run that cannot write its files."""

import errno
import re

from jaxtyping import PyTree


class CheckpointWriteError(OSError):
    """An error in writing a checkpoint. Existing checkpoints are untouched.

    If [`mamba_eqx.training.fit`][] cannot write the last checkpoint, the error contains the state
    of the run, so nothing is lost while the process lives.
    """

    state: PyTree = None
    """The state of the run, if `fit` could not write the last checkpoint."""

    step: int | None = None
    """The number of completed steps, if `fit` could not write the last checkpoint."""


def write_error(error: Exception, what: str) -> CheckpointWriteError:
    """Returns the error for a failed write, with the error number of the operating system."""
    if isinstance(error, OSError):
        code = error.errno
    else:  # Errors of the safetensors package contain the number only in their text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else None
    return CheckpointWriteError(
        code or errno.EIO,
        f"{what} ({error}). Check that the disk is not full and that the folder is writable.",
    )
