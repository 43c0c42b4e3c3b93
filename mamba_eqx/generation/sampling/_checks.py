"""Validation of the sampling options. Values that JAX traces are not known and not checked."""

import contextlib
import math
import numbers
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer


PerRow = float | Float[Array, "*rows"] | Float[np.ndarray, "*rows"] | Sequence[float]
"""An option: one number, or one for each row."""
PerRowInt = int | Integer[Array, "*rows"] | Integer[np.ndarray, "*rows"] | Sequence[int]
"""An integer option: one number, or one for each row."""

_FLOAT32 = np.finfo(np.float32)
_TINY = float(_FLOAT32.tiny)
LARGEST = float(_FLOAT32.max)
"""The largest finite number of the dtype in which options are computed."""


def check_temperature(value: object) -> None:
    number = read_number("temperature", value)
    if number is not None and not _TINY <= number < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, but got temperature={number}. For the "
            "limit of 0 use `greedy`, or `Sampling(temperature=0)`."
        )


def check_temperature_or_greedy(value: object) -> None:
    number = read_number("temperature", value)
    if number is not None and number != 0 and not _TINY <= number < math.inf:
        raise ValueError(
            "`temperature` must be 0 (greedy decoding), or positive and finite, but got "
            f"temperature={number}. Use 1 to sample from the distribution of the model."
        )


def check_top_k(k: object) -> None:
    number = read_number("top_k", k)
    if number is not None and (number < 1 or not _is_integer(number)):
        raise ValueError(
            f"`top_k` must be an integer of at least 1, but got top_k={number}. Use `None` to keep "
            "all tokens."
        )


def check_top_k_or_all(k: object) -> None:
    number = read_number("top_k", k)
    if number is not None and (number < 0 or not _is_integer(number)):
        raise ValueError(
            "`top_k` must be a positive integer, or 0 or `None` to keep all tokens, but got "
            f"top_k={number}."
        )


def check_top_p(p: object) -> None:
    number = read_number("top_p", p)
    if number is not None and not 0 < number <= 1:
        raise ValueError(
            f"`top_p` must be within 0 < top_p <= 1, but got top_p={number}. Use 1 or `None` to "
            "keep all tokens."
        )


def check_min_p(p: object) -> None:
    number = read_number("min_p", p)
    if number is not None and not 0 <= number <= 1:
        raise ValueError(
            f"`min_p` must be within 0 <= min_p <= 1, but got min_p={number}. Use 0 or `None` to "
            "keep all tokens."
        )


def check_typical_p(p: object) -> None:
    number = read_number("typical_p", p)
    if number is not None and not 0 < number <= 1:
        raise ValueError(
            f"`typical_p` must be within 0 < typical_p <= 1, but got typical_p={number}. Use 1 or "
            "`None` to keep all tokens."
        )


def check_each(name: str, value: object, check: Callable[[object], None]) -> None:
    """Checks an option that is one number, or one for each row."""
    try:
        each = np.asarray(value)
    except (ValueError, TypeError):  # From lists of different lengths, or foreign objects.
        each = np.asarray(None)
    if each.ndim == 0:
        check(value)
    elif each.ndim == 1:
        for one in each.tolist():
            check(one)
    else:
        raise ValueError(
            f"`{name}` must be one number, or one for each row, but got an array of shape "
            f"{each.shape}."
        )


def read_number(name: str, value: object) -> float | int | None:
    """Returns the value as a Python number, or `None` if it is traced and therefore unknown.

    **Raises:** `ValueError` if the value is not one real number.
    """
    if isinstance(value, Tracer):
        return None
    number = value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.shape == ():
        with contextlib.suppress(TypeError):  # From random keys, which are no numbers.
            number = np.asarray(value).item()
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise ValueError(f"`{name}` must be one number, but got {name}={shorten(value)}.")
    # Fractions, and any other kind of number that Python has no literals for, become floats.
    try:
        return number if isinstance(number, int) else float(number)
    except OverflowError:
        return math.copysign(math.inf, number)


def shorten(value: object) -> str:
    """Formats a value for a message, on one line and not longer than 100 characters."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 100 else shown[:97] + "..."


def _is_integer(number: float | int) -> bool:
    return isinstance(number, int) or number.is_integer()
