from typing import Any

import numpy as np


def check_count(name: str, value: Any) -> None:
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or not 1 <= value < 2**31:
        raise ValueError(
            f"`{name}` must be an integer of at least 1 and below 2**31, but got {name}={value!r}."
        )


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, but got {name}={value!r}.")
