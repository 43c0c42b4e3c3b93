"""Checks of single options; each raises a `ValueError` that names the option and its value.

Constructors, configs and generation options share these functions, so that an option is equally
strict wherever it is given.
"""

import math
from typing import TypeGuard, TypeVar, cast

import jax
import numpy as np


_Value = TypeVar("_Value")


def check_positive(name: str, value: object) -> None:
    """Raises unless `value` is a Python integer of at least 1.

    The integers of NumPy are refused, because sizes of models are written to JSON.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, but got {name}={value!r}.")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raises unless `value` is an integer (of Python or NumPy) of at least `least` that fits into
    int32.

    Compiled loops count in int32.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not least <= value < 2**31
    ):
        raise ValueError(
            f"`{name}` must be an integer of at least {least} and below 2**31, but got "
            f"{name}={value!r}."
        )


def check_positive_number(name: str, value: object) -> None:
    """Raises unless `value` is a positive, finite number."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number, but got {name}={value!r}.")


def check_positive_numbers(name: str, value: object, count: int, each: str) -> None:
    """Raises unless `value` is a tuple of `count` positive, finite numbers.

    `each` says for messages what each number is for.
    """
    if (
        not isinstance(value, tuple)
        or len(value) != count
        or not all(_is_number(number) and 0 < number < math.inf for number in value)
    ):
        raise ValueError(
            f"`{name}` must be a tuple of {count} positive numbers, one for each {each}, but got "
            f"{name}={value!r}."
        )


def positive_float(name: str, value: object) -> float:
    """Returns a positive, finite number, possibly of NumPy or JAX, as a Python float.

    **Raises:** `ValueError` if `value` is no such number.
    """
    number = to_python(value)
    check_positive_number(name, number)
    return float(cast(float, number))


def check_fraction(name: str, value: object) -> None:
    """Raises unless `value` is a number strictly between 0 and 1, such as the epsilon of a norm."""
    if not _is_number(value) or not 0 < value < 1:
        raise ValueError(f"`{name}` must be a number between 0 and 1, but got {name}={value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raises unless `value` is `True` or `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, but got {name}={value!r}.")


def to_python(value: _Value) -> _Value:
    """Converts numbers of NumPy and JAX to Python's, and lists and arrays of numbers to tuples.

    The constructors of layers accept both and store Python's, so that a config can be read off the
    layer and written to JSON. Configs accept Python's only. Other values are returned unchanged.
    """
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return to_python(cast(_Value, value.tolist()))
    if isinstance(value, list | tuple):
        return cast(_Value, tuple(map(to_python, value)))
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and not isinstance(value, bool)
