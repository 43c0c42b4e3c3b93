"""Checkpoints of a training run: written atomically, restored bit for bit."""

import errno
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from jaxtyping import PyTree
from safetensors import SafetensorError

from .._atomic import atomic_folder, leftover_of, remove_folder
from .._checks import check_count
from ..formats import CheckpointError, StoredTensor, open_safetensors, write_safetensors
from ._checkpoint_arrays import fill, split
from ._checkpoint_record import (
    Record,
    check_config,
    normalised_config,
    read_record,
    sha256_of,
    versions,
)
from ._write_error import write_error


State = TypeVar("State")
_STATE = "state.safetensors"
_RECORD = "checkpoint.json"
_NAME = re.compile(r"step-([0-9]{9,})")
# The errors of a file that is missing, is a folder (or the reverse) or is on a failing disk. Other
# errors of the system, such as too many open files, say nothing about the checkpoint.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


class Checkpoints:
    """The checkpoints of one training run, in a folder.

    A checkpoint is a folder with the arrays of a state (`state.safetensors`, PRNG keys and bfloat16
    included) and a record of the run (`checkpoint.json`). The folder is written under another name,
    forced to disk and renamed, so it appears complete or not at all. If writing fails, earlier
    checkpoints are untouched. The record contains the SHA-256 checksum of the arrays and of itself,
    so that a file that changes later is noticed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, object] | None = None,
        keep: int = 2,
    ):
        """**Arguments:**

        - `folder`: the folder of the checkpoints. It is created if it does not exist.
        - `config`: the settings of the run, as JSON. They are stored in each checkpoint and
            compared when one is restored.
        - `keep`: the number of newest checkpoints to keep, at least 1. The best one is kept too.

        **Raises:** `ValueError` if `keep` is below 1, or `config` is not JSON or has more than
        4 MiB; [`mamba_eqx.training.CheckpointWriteError`][] if the folder cannot be created.
        """
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, but got {keep}.")
        self.folder = Path(folder)
        self._keep = keep
        self._config = normalised_config(config or {})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, f"Could not create {self.folder}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in increasing order."""
        found = (_NAME.fullmatch(name) for name in self._names())
        return sorted(
            int(match[1]) for match in found if match and self.path(int(match[1])).name == match[0]
        )

    @property
    def scores(self) -> dict[int, float]:
        """The score of each step whose checkpoint has one."""
        found = {step: self._score(step) for step in self.steps}
        return {step: score for step, score in found.items() if score is not None}

    @property
    def best(self) -> int | None:
        """The step with the lowest score, or `None` if no checkpoint has a score."""
        scores = self.scores
        return min(scores, key=scores.__getitem__) if scores else None

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint, whether it exists or not.

        **Arguments:**

        - `step`: the number of completed steps.
        """
        return self.folder / f"step-{step:09}"

    def save(self, step: int, state: PyTree, *, score: float | None = None) -> None:
        """Writes a checkpoint, then removes those that are neither among the newest nor the best.

        **Arguments:**

        - `step`: the number of completed steps, at least 0.
        - `state`: any pytree of arrays. Other leaves (numbers, functions) are not stored, but
            numbers are compared when the checkpoint is restored.
        - `score`: the score of the state, a finite number. The checkpoint with the lowest score is
            the best one.

        **Raises:** [`mamba_eqx.training.CheckpointWriteError`][] if the checkpoint cannot be
        written; `ValueError` if two leaves of `state` have the same name, `score` is not finite, or
        `step` is negative or no integer.
        """
        check_count("step", step, least=0)
        step = int(step)
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"`score` must be finite, but got {score}. Save the checkpoint without a score."
            )
        score = None if score is None else float(score)
        parts = split(state)
        try:
            with atomic_folder(self.path(step), sync=True) as temporary:
                write_safetensors(
                    temporary / _STATE, parts.tensors, {"format": "mamba_eqx.training"}
                )
                record = Record(
                    step=step,
                    score=score,
                    config=self._config,
                    versions=versions(),
                    keys=parts.keys,
                    constants=parts.constants,
                    state_sha256=sha256_of(temporary / _STATE),
                )
                (temporary / _RECORD).write_text(record.to_json(), "utf-8")
            for old in set(self.steps[: -self._keep]) - {self.best}:
                remove_folder(self.path(old))
        except (OSError, SafetensorError) as error:
            newest = self.path(self.steps[-1]) if self.steps else "none"
            raise write_error(
                error,
                f"Could not write the checkpoint of step {step}; the newest complete checkpoint is "
                f"{newest}",
            ) from error

    def restore(self, like: State, *, step: int | None = None) -> tuple[State, int] | None:
        """Restores the newest complete checkpoint, and removes unfinished ones of a killed process.

        A checkpoint is damaged if its files are missing, incomplete or unreadable, or do not have
        the checksums that they were written with. A damaged checkpoint is renamed, with a warning,
        and the one before it is restored. Checkpoints of earlier versions have no checksums, and
        only the structure of their files is checked.

        **Arguments:**

        - `like`: a state of the same structure, shapes and dtypes, such as the initial state of a
            new run. Its leaves may be `jax.ShapeDtypeStruct`s.
        - `step`: the step to restore in place of the newest one, for example `checkpoints.best`.

        **Returns:**

        The state and its step, or `None` if there is no checkpoint.

        **Raises:** [`mamba_eqx.CheckpointError`][] if the checkpoint has another config or another
        structure, or if every checkpoint (or that of `step`) is damaged; `FileNotFoundError` if
        `step` has no checkpoint; another `OSError` if the system cannot read the files, for example
        because they belong to another user.
        """
        self._remove_leftovers()
        if step is not None and not os.path.lexists(self.path(step)):
            raise FileNotFoundError(
                errno.ENOENT, f"There is no checkpoint of step {step}", str(self.path(step))
            )
        steps = self.steps if step is None else [step]
        damaged: list[tuple[Path, CheckpointError]] = []
        for number in reversed(steps):
            path = self.path(number)
            try:
                record, stored = _open(path, number)
            except CheckpointError as fault:
                damaged.append((path, fault))
                continue
            for other, fault in damaged:
                warnings.warn(
                    f"The checkpoint {other} is damaged ({fault}). {_set_aside(other)}, and the "
                    "checkpoint before it is restored.",
                    stacklevel=2,
                )
            check_config(path, record.config, self._config)
            return fill(path, like, stored, record), number
        if step is not None:
            raise damaged[0][1]
        if damaged:
            # The checkpoints keep their names, because the next start would otherwise find none and
            # begin a new run.
            raise CheckpointError(
                f"All {len(damaged)} checkpoints in {self.folder} are damaged "
                f"({damaged[0][1]}). Put an intact copy in the place of one, or remove the folder "
                "to train from the beginning."
            )
        return None

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def _remove_leftovers(self) -> None:
        for name in self._names():
            if _NAME.fullmatch(leftover_of(name) or ""):
                leftover = self.folder / name
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    def _score(self, step: int) -> float | None:
        try:
            return read_record(self.path(step) / _RECORD).score
        except (CheckpointError, OSError):
            return None


def _open(path: Path, step: int) -> tuple[Record, dict[str, StoredTensor]]:
    """Opens a checkpoint.

    **Raises:** `CheckpointError` if the checkpoint is damaged; `OSError` if the system cannot read
    its files.
    """
    try:
        record = read_record(path / _RECORD)
        if record.step != step:
            raise CheckpointError(
                f"{path / _RECORD} is the record of step {record.step}, not of step {step}."
            )
        stored = open_safetensors(path / _STATE)
        record.check_state(path / _STATE)
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CheckpointError(f"{error.filename or path}: {error.strerror}.") from None
    return record, stored


def _set_aside(path: Path) -> str:
    """Renames a damaged checkpoint, if possible, and returns a clause that says what was done."""
    aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except OSError as error:
        return f"It could not be renamed ({error.strerror})"
    return f"It was renamed to {aside.name}"
