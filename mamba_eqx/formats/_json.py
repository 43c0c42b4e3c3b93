"""Strict reading of JSON files."""

import json
import math
from pathlib import Path

from ._files import read_bytes
from ._tensors import CheckpointError, quote


# Parsed JSON can take thirty times the memory of its text. This allows for 20,000 tensors.
_MAX_CONFIG = 2**18


def read_config(path: Path, max_size: int = _MAX_CONFIG) -> object:
    """Reads a config file, with infinities in the notation of Python or of transformers.

    **Arguments:**

    - `path`: the file.
    - `max_size`: the maximum size of the file in bytes.

    **Returns:**

    The parsed JSON.

    **Raises:** `CheckpointError` for NaN, a key that occurs twice, a file that is too large, and
    anything that is not JSON.
    """
    try:
        return decode_numbers(read_json(path, max_size))
    except RecursionError:
        raise CheckpointError(f"{path}: it is nested too deeply: download it again.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_object(path: Path, max_size: int) -> dict[str, object]:
    """Reads a config file that holds a JSON object. For the arguments see `read_config`.

    **Raises:** `CheckpointError` as `read_config` does, and for anything but an object.
    """
    values = read_config(path, max_size)
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: it must be a JSON object, but is {quote_value(values)}. Download or save it "
            "again."
        )
    return values


def read_json(path: Path, max_size: int) -> object:
    """Reads a JSON file. For the arguments see `read_config`.

    **Raises:** `CheckpointError`, whose message does not name the file, for a key that occurs
    twice, a file that is too large, and anything that is not JSON.
    """
    content = read_bytes(path, max_size)
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except CheckpointError:
        raise
    # Deep nesting raises a `RecursionError`, any other fault a `ValueError`.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"it is not valid JSON ({quote(str(error))}): download or save it again."
        ) from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns the pairs of a JSON object as a dict, for the `object_pairs_hook` of `json.loads`.

    **Raises:** `CheckpointError` if a key occurs twice.
    """
    unique: dict[str, object] = {}
    for name, value in pairs:
        if name in unique:
            raise CheckpointError(
                f"the key {quote(name)} occurs twice, so its value is ambiguous: remove one of the "
                "two, or save the file again."
            )
        unique[name] = value
    return unique


def decode_numbers(value: object, where: str = "") -> object:
    """Replaces transformers' encoding of infinity, `{"__float__": "Infinity"}`, by the number.

    **Arguments:**

    - `value`: parsed JSON.
    - `where`: the name of the field that holds `value`, for messages.

    **Raises:** `CheckpointError` for NaN in either spelling. NaN is not a sensible value of any
    field, and would pass comparisons silently.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            encoded = value["__float__"]
            if encoded not in ("Infinity", "-Infinity", "NaN"):
                raise CheckpointError(f"`{where}` is not a number: {quote_value(value)}.")
            return decode_numbers(float(encoded), where)
        return {key: decode_numbers(entry, join_keys(where, key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [decode_numbers(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"`{where}` is NaN: set it to a number.")
    return value


def join_keys(where: str, key: str) -> str:
    """Returns the name of the field `key` in the field `where`, such as `"ssm_cfg.d_state"`."""
    return f"{where}.{key}" if where else key


def quote_value(value: object) -> str:
    """Formats a JSON value for a message: escaped, and truncated to 60 characters."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else quoted[:57] + "..."
