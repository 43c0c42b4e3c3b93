"""Reads the fields of a config, every one of them on purpose."""

import math
from collections.abc import Collection
from typing import Any

from ...formats import CheckpointError, quote_value


# Far beyond any model, and small enough that the product of three is an honest shape.
_MAX_SIZE = 2**24
_MAX_LAYERS = 2**10


class Fields:
    """The fields of a JSON object, each to be read or to be named as ignorable.

    Strictness lives here: a value of another type or beyond all sense is an error, and so is a
    field that nobody asked for, because it may change what the model computes.
    """

    def __init__(self, values: object, name: str):
        """**Arguments:**

        - `values`: the parsed JSON.
        - `name`: what to call the object in messages.

        **Raises:** `CheckpointError` if `values` is not an object.
        """
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{name} must be a JSON object, but is {quote_value(values)}. "
                "Take the `config.json` that belongs to the weights."
            )
        self._values: dict[str, Any] = values
        self._unread = dict.fromkeys(values)
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any) -> Any:
        """The value as it is."""
        self._unread.pop(key, None)
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; without a default the field must be there."""
        value = self.get(key, default)
        if value is None and key not in self._values:
            raise CheckpointError(
                f"{self._name} has no `{key}`, which is required. It is incomplete, or of a "
                "layout that is not supported."
            )
        return self._integer(key, value, 1, _MAX_SIZE)

    def optional_size(self, key: str, default: int) -> int:
        """An integer of at least 1; the default if it is not there or null."""
        return default if self.get(key, None) is None else self.size(key)

    def layers(self, key: str, default: int | None = None) -> int:
        """The number of layers."""
        return self._integer(key, self.size(key, default), 1, _MAX_LAYERS)

    def natural(self, key: str, default: int) -> int:
        """An integer of at least 0."""
        return self._integer(key, self.get(key, default), 0, _MAX_SIZE)

    def indices(self, key: str, count: int) -> frozenset[int]:
        """A list of different integers from 0 to `count - 1`; none if it is not there or null."""
        value = self.get(key, None)
        value = [] if value is None else value
        if (
            not isinstance(value, list)
            or any(type(i) is not int or not 0 <= i < count for i in value)
            or len(set(value)) != len(value)
        ):
            raise self.error(key, f"must be a list of different integers from 0 to {count - 1}")
        return frozenset(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def number(self, key: str, default: int | float) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a number")
        if not (0 < value <= _MAX_SIZE):
            raise self.error(key, f"must be above 0 and at most {_MAX_SIZE}")
        return float(value)

    def multiple_of(self, size: int, key: str, default: int | float) -> int:
        """`int(number * size)`, as upstream has it, where the field is the number."""
        multiple = int(self.number(key, default) * size)
        if not 1 <= multiple <= _MAX_SIZE:
            raise self.error(key, f"times {size} must be from 1 to {_MAX_SIZE}")
        return multiple

    def limit(self, key: str) -> tuple[float, float]:
        """A smallest and a largest step size; from zero to infinity if the field is not there."""
        value = self.get(key, [0.0, math.inf])
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value)
            or not 0 <= value[0] <= value[1]
            or value[0] > _MAX_SIZE
            or value[1] == 0
        ):
            raise self.error(key, "must be two numbers in order, from 0 on")
        return float(value[0]), float(value[1])

    def only(self, key: str, supported: Collection[Any], default: Any) -> Any:
        """One of the values that we can honour."""
        value = self.get(key, default)
        # By type too, because `0 == False`.
        if not any(type(value) is type(known) and value == known for known in supported):
            options = " or ".join(map(quote_value, supported))
            raise self.error(key, f"is supported only as {options}")
        return value

    def ignore(self, keys: Collection[str]) -> None:
        """Names fields that have no influence on what the model computes."""
        for key in keys:
            self._unread.pop(key, None)

    def finish(self) -> None:
        """**Raises:** `CheckpointError` if there is a field that was neither read nor ignored."""
        if self._unread:
            names = ", ".join(quote_value(key) for key in list(self._unread)[:10])
            raise CheckpointError(
                f"{self._name} has fields of unknown meaning, which may change what the model "
                f"computes: {names}. If they do not, remove them from the config."
            )

    def error(self, key: str, requirement: str) -> CheckpointError:
        """The error that says which field has which value, and what it ought to be."""
        value = self._values.get(key)
        return CheckpointError(
            f"`{key}` of {self._name} {requirement}, but is {quote_value(value)}."
        )

    def _integer(self, key: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}")
        return value


def limit_to_json(limit: tuple[float, float]) -> list[Any]:
    """What `Fields.limit` reads, infinity in transformers' spelling."""
    return [{"__float__": "Infinity"} if bound == math.inf else bound for bound in limit]
