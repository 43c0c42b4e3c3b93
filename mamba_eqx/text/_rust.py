"""Calls of the package `tokenizers`, which is written in Rust."""

from collections.abc import Callable
from typing import TypeVar


_Result = TypeVar("_Result")


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
        raise ValueError(f"{failed}: {error}.") from error
    except BaseException as error:
        # A panic in Rust is no `Exception`, and its class cannot be imported.
        if type(error).__name__ == "PanicException":
            raise ValueError(f"{failed}: {error}.") from error
        raise
