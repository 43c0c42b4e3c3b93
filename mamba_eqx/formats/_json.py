import json
import math
import stat
from pathlib import Path
from typing import Any

from ._tensors import CheckpointError, quote


def decode_numbers(value: Any, where: str = "") -> Any:
    """Parsed JSON with transformers' spelling of infinity, `{"__float__": "Infinity"}`, resolved.

    **Raises:** `CheckpointError` for NaN in either spelling, naming the field: no field can mean
    it, and a comparison with it passes in silence.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            spelt = value["__float__"]
            if spelt not in ("Infinity", "-Infinity", "NaN"):
                raise CheckpointError(f"`{where}` is not a number: {quote_value(value)}.")
            return decode_numbers(float(spelt), where)
        return {key: decode_numbers(entry, join_keys(where, key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [decode_numbers(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"`{where}` is NaN: set it to a number.")
    return value


# Parsed JSON can take thirty times the memory of its text. There is room for 20,000 tensors.
_MAX_CONFIG = 2**18


def read_config(path: Path, max_size: int = _MAX_CONFIG) -> Any:
    """Parses a config, infinity in either spelling included.

    **Arguments:**

    - `max_size`: the most bytes that it may have.

    **Raises:** `CheckpointError` for NaN, a key that occurs twice, and all that is not JSON.
    """
    try:
        return decode_numbers(read_json(path, max_size))
    except RecursionError:
        raise CheckpointError(f"{path}: it is nested too deeply: download it again.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json(path: Path, max_size: int) -> Any:
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        # Reading a named pipe, say, waits for someone to write.
        raise CheckpointError("it is not a regular file: put the file itself there.")
    if status.st_size > max_size:
        raise CheckpointError(
            f"it has {status.st_size} bytes, but at most {max_size} are read: it is not the file "
            "that it should be. Download it again."
        )
    try:
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except CheckpointError:
        raise
    # Deep nesting ends in a `RecursionError`; all else that may be wrong is a `ValueError`.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"it is not valid JSON ({quote(str(error))}): download or save it again."
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise CheckpointError(f"the key {quote(name)} occurs twice: remove one.")
        unique[name] = value
    return unique


def join_keys(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def quote_value(value: object) -> str:
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else quoted[:57] + "..."
