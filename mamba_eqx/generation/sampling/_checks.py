"""Validation of the sampling options. Values that JAX traces are not known and not checked."""

import math
import numbers
from collections.abc import Sequence

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer


PerRow = float | Float[Array, "*rows"] | Float[np.ndarray, "*rows"] | Sequence[float]
"""An option: one number, or one for each row."""
PerRowInt = int | Integer[Array, "*rows"] | Integer[np.ndarray, "*rows"] | Sequence[int]
"""An integer option: one number, or one for each row."""

_TINY = float(np.finfo(np.float32).tiny)


def check_temperature(value: object) -> None:
    value = _number("temperature", value)
    if value is not None and not _TINY <= value < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, but got temperature={value}."
            + (" For a temperature of 0 use `greedy`." if value == 0 else "")
        )


def check_top_k(k: object) -> None:
    value = _number("top_k", k)
    if value is not None and (value < 1 or value != int(value)):
        raise ValueError(f"`top_k` must be an integer of at least 1, but got top_k={value}.")


def check_top_p(p: object) -> None:
    value = _number("top_p", p)
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"`top_p` must be within 0 < top_p <= 1, but got top_p={value}.")


def check_min_p(p: object) -> None:
    value = _number("min_p", p)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"`min_p` must be within 0 <= min_p <= 1, but got min_p={value}.")


def check_typical_p(p: object) -> None:
    value = _number("typical_p", p)
    if value is not None and not 0 < value <= 1:
        raise ValueError(
            f"`typical_p` must be within 0 < typical_p <= 1, but got typical_p={value}."
        )


def _number(name: str, value: object) -> float | int | None:
    """Returns the value as a Python number, or `None` if it is traced and therefore unknown."""
    if isinstance(value, Tracer):
        return None
    is_scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not is_scalar or isinstance(value, bool):
        raise ValueError(f"`{name}` must be one number, but got {name}={value!r}.")
    return np.asarray(value).item()
