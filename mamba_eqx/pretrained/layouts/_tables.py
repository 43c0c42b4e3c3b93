"""Two-way tables between the fields of a config file and those of a config.

Each row of a table reads a field and writes it back, so that a table reads what it writes. A row
for fields that depend on each other consists of functions of its own.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from ._fields import Fields, limit_to_json
from ._layout import Unstorable


JSON: TypeAlias = dict[str, object]
# The arguments of a config class that the rows before have read.
Arguments: TypeAlias = dict[str, Any]


class Shared(NamedTuple):
    """What a config file says once for all mixers: the width and the eps of the norms."""

    d_model: int
    norm_eps: float


Config = TypeVar("Config")
# A row that suits every config suits each config.
_Config = TypeVar("_Config", contravariant=True)


def _accept(config: object, shared: Shared) -> None:
    del config, shared


@dataclass(frozen=True)
class Row(Generic[_Config]):
    """How some fields of a config file and some fields of a config correspond.

    - `read`: reads from the file, and returns arguments of the config class. It is given the
        arguments that the rows before have read.
    - `write`: returns the fields of the file for a config that `check` accepts.
    - `check`: raises `Unstorable` for a config that the file cannot express.
    """

    read: Callable[[Fields, Shared, Arguments], Arguments]
    write: Callable[[_Config], Mapping[str, object]]
    check: Callable[[_Config, Shared], None] = _accept


@dataclass(frozen=True)
class Table(Generic[Config]):
    """The rows for a config class.

    - `config`: the config class.
    - `rows`: are read, checked and written in order.
    - `ignored`: fields of the file without influence on what the model computes.
    """

    config: Callable[..., Config]
    rows: tuple[Row[Config], ...]
    ignored: Collection[str] = ()

    def read(self, fields: Fields, shared: Shared, **known: object) -> Config:
        """Reads a config.

        **Raises:** `CheckpointError` for invalid fields; `ValueError` of the config class.
        """
        arguments: Arguments = dict(known)
        for row in self.rows:
            arguments |= row.read(fields, shared, arguments)
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
        read=lambda fields, shared, known: {name: read(fields)},
        write=lambda config: {key: getattr(config, name)},
    )


# Below, `key` is the name in the file, `name` that in the config, and `default` the value if the
# file lacks the field.


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
    """Returns the row of a smallest and a largest step size, written unless there are no bounds."""

    def write(config: object) -> JSON:
        value = getattr(config, name)
        return {} if value == (0, math.inf) else {key: limit_to_json(value)}

    return Row(read=lambda fields, shared, known: {name: fields.limit(key)}, write=write)


def shared_eps(name: str = "norm_eps") -> Row[object]:
    """Returns the row of an eps that the file says once for the whole model."""

    def check(config: object, shared: Shared) -> None:
        value = getattr(config, name)
        if value != shared.norm_eps:
            raise Unstorable(
                f"mixers with {name}={value} in a model with norm_eps={shared.norm_eps}"
            )

    return Row(
        read=lambda fields, shared, known: {name: shared.norm_eps},
        write=lambda config: {},
        check=check,
    )


def fixed(name: str, value: object, otherwise: str) -> Row[object]:
    """Returns the row of a field of the config that the file has no field for.

    **Arguments:**

    - `value`: the only value that the layout can store.
    - `otherwise`: describes what it cannot store: a model with another value.
    """

    def check(config: object, shared: Shared) -> None:
        del shared
        found = getattr(config, name)
        if found != value:
            raise Unstorable(f"{otherwise} ({name}={found!r})")

    return Row(
        read=lambda fields, shared, known: {name: value}, write=lambda config: {}, check=check
    )


_UNSAID = object()


def constant(
    key: str, value: object, *, default: object = _UNSAID, written: bool = False
) -> Row[object]:
    """Returns the row of a field of the file that is supported with one value only.

    **Arguments:**

    - `value`: the supported value.
    - `default`: the value of a file that lacks the field; `value` if left out.
    - `written`: whether the field is written.
    """

    def read(fields: Fields, shared: Shared, known: Arguments) -> Arguments:
        del shared, known
        fields.only(key, [value], value if default is _UNSAID else default)
        return {}

    return Row(read=read, write=lambda config: {key: value} if written else {})
