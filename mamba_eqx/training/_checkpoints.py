"""Checkpoints of a training run: written atomically, restored bit for bit."""

import dataclasses
import errno
import functools
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError

from .._atomic import atomic_folder, leftover_of, remove_folder
from .._trees import named_leaves
from ..formats import (
    CheckpointError,
    StoredTensor,
    join_keys,
    open_safetensors,
    read_config,
    write_safetensors,
)


State = TypeVar("State")
_Array = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
_STATE = "state.safetensors"
_RECORD = "checkpoint.json"
_NAME = re.compile(r"step-(\d{9,})")
_PACKAGES = ("mamba_eqx", "jax", "equinox", "numpy", "optax")


class CheckpointWriteError(OSError):
    """An error in writing a checkpoint. Existing checkpoints are untouched.

    If [`mamba_eqx.training.fit`][] cannot write the last checkpoint, the error contains the state
    of the run, so nothing is lost while the process lives.
    """

    state: PyTree = None
    """The state of the run, if `fit` could not write the last checkpoint."""

    step: int | None = None
    """The number of completed steps, if `fit` could not write the last checkpoint."""


class Checkpoints:
    """The checkpoints of one training run, in a folder.

    A checkpoint is a folder with the arrays of a state (`state.safetensors`, PRNG keys and bfloat16
    included) and a record of the run (`checkpoint.json`). The folder is written under another name,
    forced to disk and renamed, so it appears complete or not at all. If writing fails, earlier
    checkpoints are untouched.
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

        **Raises:** `ValueError` if `keep` is below 1 or `config` is not JSON;
        [`mamba_eqx.training.CheckpointWriteError`][] if the folder cannot be created.
        """
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, but got {keep}.")
        self.folder = Path(folder)
        self._keep = keep
        try:
            self._config = json.loads(json.dumps(dict(config or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`config` must be JSON, but got {config!r} ({error}).") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, f"Could not create {self.folder}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in increasing order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = (_NAME.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in found if match)

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

        - `step`: the number of completed steps.
        - `state`: any pytree of arrays. Other leaves (numbers, functions) are not stored, but
            numbers are compared when the checkpoint is restored.
        - `score`: the score of the state. The checkpoint with the lowest score is the best one.

        **Raises:** [`mamba_eqx.training.CheckpointWriteError`][] if the checkpoint cannot be
        written; `ValueError` if two leaves of `state` have the same name.
        """
        parts = _split(state)
        record = _Record(step, score, self._config, _versions(), parts.keys, parts.constants)
        text = json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False) + "\n"
        try:
            with atomic_folder(self.path(step), sync=True) as temporary:
                write_safetensors(
                    temporary / _STATE, parts.tensors, {"format": "mamba_eqx.training"}
                )
                (temporary / _RECORD).write_text(text, "utf-8")
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

        A damaged checkpoint is renamed, with a warning, and the one before it is restored.

        **Arguments:**

        - `like`: a state of the same structure, shapes and dtypes, such as the initial state of a
            new run. Its leaves may be `jax.ShapeDtypeStruct`s.
        - `step`: the step to restore in place of the newest one, for example `checkpoints.best`.

        **Returns:**

        The state and its step, or `None` if there is no checkpoint.

        **Raises:** [`mamba_eqx.CheckpointError`][] if the checkpoint has another config or another
        structure, or if every checkpoint is damaged; `FileNotFoundError` if `step` has no
        checkpoint.
        """
        for name in os.listdir(self.folder):
            if _NAME.fullmatch(leftover_of(name) or ""):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        steps = self.steps if step is None else [step]
        for number in reversed(steps):
            path = self.path(number)
            try:
                record = _read_record(path)
                stored = open_safetensors(path / _STATE)
            except (CheckpointError, FileNotFoundError) as fault:
                if step is not None:
                    raise
                aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
                os.rename(path, aside)
                warnings.warn(
                    f"The checkpoint {path} is damaged ({fault}). It was renamed to {aside.name}, "
                    "and the checkpoint before it is restored.",
                    stacklevel=2,
                )
                continue
            _check_config(path, record.config, self._config)
            return _fill(path, like, stored, record), number
        if steps:
            raise CheckpointError(
                f"All {len(steps)} checkpoints in {self.folder} are damaged. Remove the folder to "
                "train from the beginning."
            )
        return None

    def _score(self, step: int) -> float | None:
        try:
            return _read_record(self.path(step)).score
        except (CheckpointError, FileNotFoundError):
            return None


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


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # The package runs from a checkout that is not installed.
            found[name] = "unknown"
    return found


@dataclasses.dataclass(frozen=True)
class _Record:
    """The content of `checkpoint.json`."""

    step: int
    score: float | None
    config: object
    versions: dict[str, str]
    keys: dict[str, str]
    """The implementation of each PRNG key."""

    constants: dict[str, str]
    """The `repr` of each leaf that is a number or a string."""


def _read_record(path: Path) -> _Record:
    values = read_config(path / _RECORD, 2**24)
    names = {field.name for field in dataclasses.fields(_Record)}
    if not isinstance(values, dict) or values.keys() != names:
        raise CheckpointError(f"{path / _RECORD} is not the record of a checkpoint.")
    return _Record(**values)


def _check_config(path: Path, stored: object, given: object, name: str = "") -> None:
    """Compares two configs.

    **Raises:** `CheckpointError`, which names the first entry that differs.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            _check_config(path, stored.get(key), given.get(key), join_keys(name, key))
    elif stored != given:
        raise CheckpointError(
            f"{path} was written by a run with {name}={stored!r}, but this run has "
            f"{name}={given!r}. Choose another folder, or resume with the same config."
        )


class _Parts(NamedTuple):
    """The leaves of a state by name, as a checkpoint stores them."""

    tensors: dict[str, np.ndarray]
    keys: dict[str, str]
    constants: dict[str, str]


def _split(state: PyTree) -> _Parts:
    """Divides the leaves of a state by kind, and copies the arrays to the host.

    **Raises:** `ValueError` if two leaves have the same name.
    """
    leaves = named_leaves(state)
    if len(leaves) != len(jax.tree.leaves(state)):
        raise ValueError(
            "The leaves of the state must have different names, but two have the same. Rename a "
            "key that contains a dot."
        )
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _Array)}
    prng_keys = {
        name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array) and _is_key(leaf)
    }
    data = arrays | {name: jr.key_data(key) for name, key in prng_keys.items()}
    # `device_get` of the whole dictionary starts every transfer before it waits for the first.
    tensors = {name: np.asarray(leaf) for name, leaf in jax.device_get(data).items()}
    constants = {
        name: repr(leaf)
        for name, leaf in leaves.items()
        if name not in arrays and isinstance(leaf, bool | int | float | str)
    }
    keys = {name: str(jr.key_impl(key)) for name, key in prng_keys.items()}
    return _Parts(tensors, keys, constants)


def _fill(path: Path, like: State, stored: dict[str, StoredTensor], record: _Record) -> State:
    """Returns `like` with the stored arrays in place of its own.

    **Raises:** `CheckpointError` if the stored state has another structure.
    """
    leaves = named_leaves(like)
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _Array)}
    missing, extra = sorted(arrays.keys() - stored.keys()), sorted(stored.keys() - arrays.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} contains a state of another structure: missing are {_abbreviated(missing)}, "
            f"unexpected are {_abbreviated(extra)}. Resume with the model and the optimiser that "
            "the checkpoint was written with."
        )
    for name, constant in record.constants.items():
        if constant != repr(leaves.get(name)):
            raise CheckpointError(
                f"{name} is {constant} in {path}, but {leaves.get(name)!r} in this state. Only "
                "arrays are restored, so give a state with the same numbers."
            )
    new = {
        name: _restored(path, name, leaf, stored[name], record.keys.get(name))
        if name in arrays
        else leaf
        for name, leaf in leaves.items()
    }
    return jax.tree.unflatten(jax.tree.structure(like), new.values())


def _restored(
    path: Path, name: str, like: _Array, stored: StoredTensor, impl: str | None
) -> jax.Array | np.ndarray | np.generic:
    """Reads a stored array.

    **Arguments:**

    - `path`, `name`: the checkpoint and the leaf, for messages.
    - `like`: an array of the same shape, dtype and kind (JAX, NumPy, PRNG key), and placement.
    - `stored`: the stored array.
    - `impl`: the implementation of a PRNG key; `None` for other arrays.

    **Raises:** `CheckpointError` if `stored` does not match `like`.
    """
    if (impl is not None) != _is_key(like):
        raise CheckpointError(f"{name} is a PRNG key in only one of {path} and this state.")
    want = like
    if impl is not None:
        dtype = jr.key(0, impl=impl).dtype
        if dtype != like.dtype:
            raise CheckpointError(
                f"{name} is a {dtype} in {path}, but a {like.dtype} in this state. Use the same "
                "PRNG implementation."
            )
        want = jax.eval_shape(jr.key_data, like)
    if stored.shape != want.shape or stored.dtype != want.dtype:
        raise CheckpointError(
            f"{name} is {stored.dtype} of shape {stored.shape} in {path}, but {want.dtype} of "
            f"shape {want.shape} in this state. Resume with the model that the checkpoint was "
            "written with."
        )
    # The array is copied, because it must outlive the file.
    value = np.array(stored.read())
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    array = jnp.asarray(value)
    if impl is not None:
        array = jr.wrap_key_data(array, impl=impl)
    if isinstance(like, jax.Array) and like.committed:
        return jax.device_put(array, like.sharding)
    return array


def _is_key(leaf: _Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abbreviated(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
