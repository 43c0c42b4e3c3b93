"""Checkpoints that appear whole or not at all, and are read back as they were."""

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
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors import SafetensorError

from .._trees import named_leaves
from ..formats import (
    CheckpointError,
    StoredTensor,
    open_safetensors,
    read_config,
    write_safetensors,
)


State = TypeVar("State")
_STATE = "state.safetensors"
_RECORD = "checkpoint.json"
_NAME = re.compile(r"step-(\d{9,})")
_LEFTOVER = re.compile(r"\.step-\d{9,}\.[0-9a-f]{8}\.tmp")
_PACKAGES = ("mamba_eqx", "jax", "equinox", "numpy", "optax")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Those that were there are there still.

    Raised by [`mamba_eqx.training.fit`][] it carries the `state` of the training and its `step`, so
    that nothing is lost as long as the process lives.
    """

    state: Any = None
    step: int | None = None


class Checkpoints:
    """The checkpoints of one training, in a folder.

    Each is a folder of its own with the arrays of a state (`state.safetensors`, PRNG keys and
    bfloat16 included) and a record of what made it (`checkpoint.json`). It is written under another
    name, forced to the disk, and renamed: it appears whole or not at all, and if writing it fails
    those before it stay.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        keep: int = 2,
    ):
        """**Arguments:**

        - `folder`: where they lie. It is made if need be.
        - `config`: what made the training, as JSON: stored in each checkpoint, and compared when
            one is read.
        - `keep`: how many of the newest are kept. The best one is kept as well.
        """
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, but got {keep}.")
        self.folder = Path(folder)
        self._keep = keep
        try:
            self._config = json.loads(json.dumps(dict(config or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`config` must be JSON, but got {config!r}: {error}.") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, f"No checkpoints can be written to {self.folder}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, the newest last."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = (_NAME.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    @property
    def scores(self) -> dict[int, float]:
        """The scores of the steps that have one."""
        found = {step: self._score(step) for step in self.steps}
        return {step: score for step, score in found.items() if score is not None}

    @property
    def best(self) -> int | None:
        """The step with the lowest score, if any has one."""
        scores = self.scores
        return min(scores, key=scores.__getitem__) if scores else None

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:09}"

    def save(self, step: int, state: Any, *, score: float | None = None) -> None:
        """Writes a checkpoint, and then removes those that are no longer to be kept.

        **Arguments:**

        - `step`: how many steps the state has behind it.
        - `state`: any pytree of arrays. Leaves that are none (numbers, functions) are not stored,
            but numbers are compared when the checkpoint is read.
        - `score`: how good it is; the checkpoint with the lowest is the best one.

        **Raises:** [`mamba_eqx.training.CheckpointWriteError`][] if it cannot be written.
        """
        target = self.path(step)
        temporary = self._temporary(target)
        tensors, keys, constants = _parts(state)
        record = {
            "step": step,
            "score": score,
            "config": self._config,
            "versions": _versions(),
            "keys": keys,
            "constants": constants,
        }
        try:
            temporary.mkdir(parents=True)
            write_safetensors(temporary / _STATE, tensors, {"format": "mamba_eqx.training"})
            text = json.dumps(record, indent=2, allow_nan=False) + "\n"
            (temporary / _RECORD).write_text(text, "utf-8")
            for path in (temporary / _STATE, temporary / _RECORD, temporary):
                _to_disk(path)
            self._remove(target)
            os.rename(temporary, target)
            _to_disk(self.folder)
            for old in set(self.steps[: -self._keep]) - {self.best}:
                self._remove(self.path(old))
        except (OSError, SafetensorError) as error:
            good = self.path(self.steps[-1]) if self.steps else "none"
            raise write_error(
                error, f"The checkpoint of step {step} was not written; the last good one is {good}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def restore(self, like: State, *, step: int | None = None) -> tuple[State, int] | None:
        """Reads the newest checkpoint that is whole, and removes what a killed process left.

        A checkpoint that is damaged is set aside, with a warning.

        **Arguments:**

        - `like`: a state of the same structure, shapes and dtypes, such as the one that a new
            training begins with. It may consist of `jax.ShapeDtypeStruct`s.
        - `step`: the step to read instead, `checkpoints.best` for example.

        **Returns:** the state and its step, or `None` if there is no checkpoint.

        **Raises:** [`mamba_eqx.CheckpointError`][] if the checkpoint is of another config or
        structure, or if there are only damaged ones.
        """
        for name in os.listdir(self.folder):
            if _LEFTOVER.fullmatch(name):
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
                    f"The checkpoint {path} is damaged ({fault}). It is now {aside.name}; the one "
                    "before it is read instead.",
                    stacklevel=2,
                )
                continue
            _check_config(path, record["config"], self._config)
            return _filled(path, like, stored, record), number
        if steps:
            raise CheckpointError(
                f"None of the {len(steps)} checkpoints in {self.folder} is whole. To train from "
                "the beginning, remove that folder."
            )
        return None

    def _score(self, step: int) -> float | None:
        try:
            return _read_record(self.path(step))["score"]
        except (CheckpointError, FileNotFoundError):
            return None

    def _temporary(self, target: Path) -> Path:
        return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")

    def _remove(self, path: Path) -> None:
        """In two moves, so that half a checkpoint never has the name of one."""
        if path.exists():
            temporary = self._temporary(path)
            os.rename(path, temporary)
            shutil.rmtree(temporary, ignore_errors=True)


def write_error(error: Exception, what: str) -> CheckpointWriteError:
    if isinstance(error, OSError):
        code = error.errno
    else:  # the safetensors package has errors of its own, with the system's number in the text
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else None
    return CheckpointWriteError(
        code or errno.EIO, f"{what} ({error}). Is the disk full, or the folder read-only?"
    )


def _to_disk(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _parts(state: Any) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, str]]:
    """The arrays, how the PRNG keys among them were made, and the numbers that are no arrays."""
    leaves = named_leaves(state)
    if len(leaves) != len(jax.tree.leaves(state)):
        raise ValueError(
            "Two leaves of the state have the same name: rename a key with a dot in it."
        )
    arrays = {name: leaf for name, leaf in leaves.items() if _is_array(leaf)}
    keys = {name: str(jr.key_impl(leaf)) for name, leaf in arrays.items() if _is_key(leaf)}
    # All are on their way before the first is waited for.
    data = {name: jr.key_data(leaf) if name in keys else leaf for name, leaf in arrays.items()}
    tensors = {name: np.asarray(leaf) for name, leaf in jax.device_get(data).items()}
    plain = bool | int | float | str
    others = {name: leaf for name, leaf in leaves.items() if name not in arrays}
    constants = {name: repr(leaf) for name, leaf in others.items() if isinstance(leaf, plain)}
    return tensors, keys, constants


def _read_record(path: Path) -> dict[str, Any]:
    record = read_config(path / _RECORD, 2**24)
    fields = {"step", "score", "config", "versions", "keys", "constants"}
    if not isinstance(record, dict) or record.keys() != fields:
        raise CheckpointError(f"{path / _RECORD} is not the record of a checkpoint.")
    return record


def _check_config(path: Path, stored: Any, given: Any, name: str = "") -> None:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            inner = f"{name}.{key}" if name else key
            _check_config(path, stored.get(key), given.get(key), inner)
    elif stored != given:
        raise CheckpointError(
            f"{path} is of a training with {name}={stored!r}, but this one has {name}={given!r}: "
            "choose another folder for it, or give what that one had."
        )


def _filled(path: Path, like: Any, stored: dict[str, StoredTensor], record: dict[str, Any]) -> Any:
    leaves = named_leaves(like)
    arrays = {name: leaf for name, leaf in leaves.items() if _is_array(leaf)}
    missing, extra = sorted(arrays.keys() - stored.keys()), sorted(stored.keys() - arrays.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} is of a state of another structure: it lacks {_some(missing)}, and has "
            f"{_some(extra)} besides. Give the model and the optimiser that it was made with."
        )
    for name, constant in record["constants"].items():
        if constant != repr(leaves.get(name)):
            raise CheckpointError(
                f"{name} is {constant} in {path}, but {leaves.get(name)!r} in this state. Only "
                "arrays are restored: give a state with the same numbers."
            )
    new = {
        name: _like(path, name, leaf, stored[name], record) if name in arrays else leaf
        for name, leaf in leaves.items()
    }
    return jax.tree.unflatten(jax.tree.structure(like), new.values())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _like(path: Path, name: str, leaf: Any, stored: StoredTensor, record: dict[str, Any]) -> Any:
    impl = record["keys"].get(name)
    if (impl is not None) != _is_key(leaf):
        raise CheckpointError(f"{name} is a PRNG key in only one of {path} and this state.")
    want = leaf
    if impl is not None:
        kind = jr.key(0, impl=impl).dtype
        if kind != leaf.dtype:
            raise CheckpointError(
                f"{name} in {path} is a {kind}, but in this state a {leaf.dtype}."
            )
        want = jax.eval_shape(jr.key_data, leaf)
    if stored.shape != want.shape or stored.dtype != want.dtype:
        raise CheckpointError(
            f"{name} in {path} is {stored.dtype} of shape {stored.shape}, but in this state it is "
            f"{want.dtype} of shape {want.shape}. Give the model that the checkpoint was made with."
        )
    # A copy: the file may go while the array is in use.
    value = np.array(stored.read())
    if isinstance(leaf, np.ndarray | np.generic):
        return value if isinstance(leaf, np.ndarray) else value[()]
    array = jnp.asarray(value)
    if impl is not None:
        array = jr.wrap_key_data(array, impl=impl)
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(array, leaf.sharding)
    return array
