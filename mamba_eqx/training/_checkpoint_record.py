"""The record of a checkpoint, `checkpoint.json`, with the checksums of the checkpoint."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax.random as jr

from ..formats import CheckpointError, join_keys, read_json


_PACKAGES = ("mamba_eqx", "jax", "equinox", "numpy", "optax")
_CHECKSUM = "sha256"  # The entry of a record with the checksum of its other entries.
_MAX_SIZE = 2**24
_MAX_CONFIG = 2**22
_MAX_DEPTH = 100


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of `checkpoint.json`, apart from the checksum of the record itself."""

    step: int
    score: float | None
    config: object
    versions: Mapping[str, str]
    keys: Mapping[str, str]
    """The implementation of each PRNG key."""

    constants: Mapping[str, str]
    """The `repr` of each leaf that is a number or a string."""

    state_sha256: str | None
    """The checksum of `state.safetensors`; `None` for checkpoints written before there was one."""

    def to_json(self) -> str:
        """Returns the text of the file."""
        values = dataclasses.asdict(self)
        return json.dumps(values | {_CHECKSUM: _digest(values)}, indent=2, allow_nan=False) + "\n"

    def check_state(self, path: Path) -> None:
        """Compares the checksum of `state.safetensors`.

        **Raises:** `CheckpointError` if the file is not the one that was written.
        """
        if self.state_sha256 not in (None, sha256_of(path)):
            raise CheckpointError(f"{path} does not have the checksum that it was written with.")


def read_record(path: Path) -> Record:
    """Reads `checkpoint.json`.

    **Raises:** `CheckpointError` if the file is damaged; `OSError` if the file cannot be read.
    """
    try:
        values = read_json(path, _MAX_SIZE)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(values, dict) or not _is_shallow(values):
        raise CheckpointError(f"{path} is not the record of a checkpoint.")
    names = {field.name for field in dataclasses.fields(Record)}
    has_checksum = _CHECKSUM in values
    checksum = values.pop(_CHECKSUM, None)
    if not has_checksum:  # Earlier versions wrote no checksums.
        values = {"state_sha256": None} | values
    elif checksum != _digest(values):
        raise CheckpointError(f"{path} does not have the checksum that it was written with.")
    record = _parse(values) if values.keys() == names else None
    if record is None:
        raise CheckpointError(f"{path} is not the record of a checkpoint.")
    if not has_checksum:
        for name, impl in record.keys.items():
            if not is_prng(impl):
                raise CheckpointError(
                    f"{path} has the unknown PRNG implementation {impl!r} for {name}."
                )
    return record


def check_config(path: Path, stored: object, given: object, name: str = "") -> None:
    """Compares two configs.

    **Raises:** `CheckpointError`, which names the first entry that differs.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            check_config(path, stored.get(key), given.get(key), join_keys(name, key))
    elif stored != given:
        raise CheckpointError(
            f"{path} was written by a run with {name}={stored!r}, but this run has "
            f"{name}={given!r}. Choose another folder, or resume with the same config."
        )


def normalised_config(config: Mapping[str, object]) -> object:
    """Returns a config as it is read back from a record.

    **Raises:** `ValueError` if the config is not JSON, or too large or too deep for a record.
    """
    try:
        text = json.dumps(dict(config), allow_nan=False)
        normalised = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`config` must be JSON, but got {config!r} ({error}).") from None
    if len(text) > _MAX_CONFIG or not _is_shallow(normalised):
        raise ValueError(
            f"`config` must have at most {_MAX_CONFIG} bytes and {_MAX_DEPTH} levels as JSON, but "
            f"has {len(text)} bytes. Replace its large entries by their checksums."
        )
    return normalised


def sha256_of(path: Path) -> str:
    """Returns the checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_prng(impl: str) -> bool:
    """Returns whether JAX has a PRNG implementation of this name."""
    try:
        jr.key(0, impl=impl)
    except ValueError:
        return False
    return True


@functools.cache
def versions() -> Mapping[str, str]:
    """Returns the versions of the packages that a run depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # The package runs from a checkout that is not installed.
            found[name] = "unknown"
    return found


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parse(values: Mapping[str, object]) -> Record | None:
    """Returns the record with these entries, or `None` if one of them has another type."""
    step, score, checksum = (values[name] for name in ("step", "score", "state_sha256"))
    packages, keys, constants = (_strings(values[n]) for n in ("versions", "keys", "constants"))
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        return None
    if score is not None:
        if isinstance(score, bool) or not isinstance(score, int | float):
            return None
        if not abs(score) <= sys.float_info.max:
            return None
        score = float(score)
    if not (checksum is None or isinstance(checksum, str)):
        return None
    if packages is None or keys is None or constants is None:
        return None
    return Record(step, score, values["config"], packages, keys, constants, checksum)


def _strings(values: object) -> dict[str, str] | None:
    """Returns a JSON object whose values are all strings, or `None` for anything else."""
    if not isinstance(values, dict):
        return None
    strings = {name: value for name, value in values.items() if isinstance(value, str)}
    return strings if len(strings) == len(values) else None


def _is_shallow(value: object) -> bool:
    """Returns whether JSON is nested less deeply than Python's recursion allows."""
    layer = [value]
    for _ in range(_MAX_DEPTH):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return True
    return False
