"""Two-way tables between the fields of a config file and those of a config.

Each row of a table reads a field and writes the same field, so that a table can read what it has
written. Rows of fields that depend on each other have functions of their own.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from ._fields import Fields, limit_to_json
from ._layout import Unstorable


JSON: TypeAlias = dict[str, object]
# Arguments of a config class by name.
Arguments: TypeAlias = dict[str, Any]


class Shared(NamedTuple):
    """The values that a config file contains once for all mixers: width, and the eps of norms."""

    d_model: int
    norm_eps: float


class RowInput(NamedTuple):
    """The input of a row's `read`.

    - `fields`: the fields of the file.
    - `shared`: the values for all mixers.
    - `known`: the arguments that the rows before have read.
    """

    fields: Fields
    shared: Shared
    known: Arguments


Config = TypeVar("Config")
# Contravariant, because a row for every config is also a row for each config class.
_Config = TypeVar("_Config", contravariant=True)


def _read_nothing(_given: RowInput) -> Arguments:
    return {}


def _write_nothing(_config: object) -> JSON:
    return {}


def _accept(_config: object, _shared: Shared) -> None:
    pass


@dataclass(frozen=True)
class Row(Generic[_Config]):
    """The correspondence between some fields of a config file and some fields of a config.

    A part that is left out has no effect.

    - `read`: reads fields of the file, and returns arguments of the config class.
    - `write`: returns the fields of the file for a config that `check` accepts.
    - `check`: raises `Unstorable` for a config that the file cannot express.
    """

    read: Callable[[RowInput], Arguments] = _read_nothing
    write: Callable[[_Config], Mapping[str, object]] = _write_nothing
    check: Callable[[_Config, Shared], None] = _accept


@dataclass(frozen=True)
class Table(Generic[Config]):
    """The rows for a config class.

    - `config`: the config class.
    - `rows`: the rows, in the order in which they are read, checked and written.
    - `ignored`: fields of the file that do not affect what the model computes.
    """

    config: Callable[..., Config]
    rows: tuple[Row[Config], ...]
    ignored: Collection[str] = ()

    def read(self, fields: Fields, shared: Shared, **known: object) -> Config:
        """Reads a config.

        **Arguments:**

        - `fields`: the fields of the file.
        - `shared`: the values for all mixers.
        - `known`: arguments of the config class that are known already.

        **Raises:** `CheckpointError` for invalid fields; `ValueError` of the config class.
        """
        arguments: Arguments = dict(known)
        for row in self.rows:
            arguments |= row.read(RowInput(fields, shared, arguments))
        fields.ignore(self.ignored)
        return self.config(**arguments)

    def check(self, config: Config, shared: Shared) -> None:
        """Checks that the rows can express a config.

        **Raises:** `Unstorable` if they cannot.
        """
        for row in self.rows:
            row.check(config, shared)

    def write(self, config: Config) -> JSON:
        """Returns the fields of the file for a config that `check` accepts."""
        return {key: value for row in self.rows for key, value in row.write(config).items()}


def _field(key: str, name: str, read: Callable[[Fields], object]) -> Row[object]:
    return Row(
        read=lambda given: {name: read(given.fields)},
        write=lambda config: {key: getattr(config, name)},
    )


# Below, `key` is the name of a field in the file, `name` its name in the config, and `default` its
# value if the file lacks the field.


def size(key: str, name: str, default: int | None = None) -> Row[object]:
    """Returns the row of an integer of at least 1."""
    return _field(key, name, lambda fields: fields.size(key, default))


def natural(key: str, name: str, default: int) -> Row[object]:
    """Returns the row of an integer of at least 0."""
    return _field(key, name, lambda fields: fields.natural(key, default))


def flag(key: str, name: str, default: bool) -> Row[object]:
    """Returns the row of a boolean."""
    return _field(key, name, lambda fields: fields.flag(key, default))


def number(key: str, name: str, default: float) -> Row[object]:
    """Returns the row of a number above 0."""
    return _field(key, name, lambda fields: fields.number(key, default))


def limit(key: str, name: str) -> Row[object]:
    """Returns the row of two bounds, which are written unless they are 0 and infinity."""

    def write(config: object) -> JSON:
        value = getattr(config, name)
        return {} if value == (0, math.inf) else {key: limit_to_json(value)}

    return Row(read=lambda given: {name: given.fields.limit(key)}, write=write)


def shared_eps(name: str = "norm_eps") -> Row[object]:
    """Returns the row of an eps that the file contains once for the whole model."""

    def check(config: object, shared: Shared) -> None:
        value = getattr(config, name)
        if value != shared.norm_eps:
            raise Unstorable(
                f"mixers with {name}={value} in a model with norm_eps={shared.norm_eps}"
            )

    return Row(
        read=lambda given: {name: given.shared.norm_eps},
        check=check,
    )


def fixed(name: str, value: object, otherwise: str) -> Row[object]:
    """Returns the row of a field of the config that the file has no field for.

    **Arguments:**

    - `name`: the name of the field.
    - `value`: the only value that the layout can store.
    - `otherwise`: describes models with another value, which the layout cannot store.
    """

    def check(config: object, _: Shared) -> None:
        found = getattr(config, name)
        if found != value:
            raise Unstorable(f"{otherwise} ({name}={found!r})")

    return Row(read=lambda given: {name: value}, check=check)


def inverse(function: Callable[[float], float], value: float, near: float) -> float | None:
    """Returns the positive number that a function maps to a value exactly, or `None`.

    **Arguments:**

    - `function`: an increasing or decreasing function of one multiplication or division.
    - `value`: the value.
    - `near`: the number up to rounding.
    """
    if math.isinf(near):
        return None
    # Rounding may give a neighbour of the number, and some values are those of no number.
    candidates = (float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
    return next((x for x in candidates if x > 0 and function(x) == value), None)


_SAME = object()


def constant(
    key: str, value: object, *, default: object = _SAME, written: bool = False
) -> Row[object]:
    """Returns the row of a field of the file that must have one value.

    **Arguments:**

    - `key`: the name of the field.
    - `value`: the supported value.
    - `default`: the value of a file that lacks the field; `value` if left out.
    - `written`: whether the field is written.
    """

    def read(given: RowInput) -> Arguments:
        given.fields.only(key, [value], value if default is _SAME else default)
        return {}

    return Row(read=read, write=lambda config: {key: value} if written else {})
