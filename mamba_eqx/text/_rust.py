"""Calls of the package `tokenizers`, which is written in Rust."""

from collections.abc import Callable
from typing import TypeVar


_Result = TypeVar("_Result")

_LONGEST = 300  # characters of a message


def checked(call: Callable[[], _Result], failed: str) -> _Result:
    """Calls `tokenizers`, and converts all of its failures to `ValueError`.

    **Arguments:**

    - `call`: the call.
    - `failed`: what could not be done, as the beginning of the message.

    **Returns:**

    The result of the call.

    **Raises:** `ValueError` if `tokenizers` fails.
    """
    try:
        return call()
    except MemoryError:
        raise
    except Exception as error:  # `tokenizers` raises a bare `Exception`.
        raise ValueError(f"{failed}: {_shown(error)}.") from error
    except BaseException as error:
        # A panic in Rust is no `Exception`, and its class cannot be imported.
        if type(error).__name__ == "PanicException":
            raise ValueError(f"{failed}: {_shown(error)}.") from error
        raise


def _shown(error: BaseException) -> str:
    """Returns the message of `tokenizers`, which can quote a long text of the file as it is."""
    text = str(error)
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
