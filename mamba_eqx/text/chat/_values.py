"""The values of a template, and how they are printed."""

from collections.abc import Mapping
from typing import NamedTuple

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from ._limits import MAX_DEPTH, allow_for_input, spend, spend_on_all
from ._written import LABEL, USER, Text


class InputError(ValueError):
    """An argument that is not as it must be."""


class GivenInt(int):
    """An integer of the input, or made of one, whose digits are therefore the user's."""


def number_from(result: object, *sources: object) -> object:
    """Returns the result of an operation on numbers, which is the user's if one of them is."""
    if type(result) is int and any(isinstance(source, GivenInt) for source in sources):
        return GivenInt(result)
    return result


class Namespace:
    """A jinja `namespace`, whose attributes a template can assign."""

    def __init__(self, attributes: Mapping[str, object]):
        self.attributes: dict[str, object] = {}
        for name, value in attributes.items():
            self.assign(name, value)

    def assign(self, name: str, value: object) -> None:
        """Assigns an attribute."""
        if name.startswith("_"):
            raise SecurityError(f"namespaces have no attributes like {name!r}")
        self.attributes[name] = value


class Group(NamedTuple):
    """A group of the filter `groupby`."""

    grouper: object
    list: list[object]


def given(value: object, where: str, depth: int = 0) -> object:
    """Copies JSON-like data of the caller, whose texts are the user's.

    **Arguments:**

    - `value`: the data.
    - `where`: its name, for messages.
    - `depth`: the number of values around it.

    **Raises:** `InputError` if it is not like JSON.
    """
    spend(1)
    if depth > MAX_DEPTH:
        raise InputError(f"{where} must nest at most {MAX_DEPTH} levels. Flatten the data.")
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        allow_for_input(value)
        return Text(str.__str__(value))
    if isinstance(value, int):
        return GivenInt(value)
    if isinstance(value, Mapping):
        return {
            given(key, where, depth + 1): given(item, where, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [given(item, where, depth + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(given(item, where, depth + 1) for item in value)
    raise InputError(
        f"{where} must consist of strings, numbers, booleans, None, lists and mappings, but got "
        f"a {type(value).__name__}. Convert the value."
    )


def text_of(value: object) -> Text:
    """Returns what a template prints for a value: `str(value)`."""
    if isinstance(value, str):
        return Text.of(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(int.__repr__(value), USER if isinstance(value, GivenInt) else LABEL)
    if isinstance(value, Undefined):
        return Text(str(value))
    return repr_of(value)


def repr_of(value: object) -> Text:
    """Returns `repr(value)`."""
    pieces: list[str] = []
    _spell(value, pieces, 0)
    return Text("").join(pieces)


def _spell(value: object, pieces: list[str], depth: int) -> None:
    spend(1)
    if isinstance(value, str):
        text = Text.of(value)
        pieces.append(Text(repr(str.__str__(text)), text.author() if text else USER))
    elif isinstance(value, int) and not isinstance(value, bool):
        pieces.append(text_of(value))
    elif value is None or isinstance(value, (bool, float, complex, range, Undefined)):
        pieces.append(repr(value))
    elif isinstance(value, (Mapping, list, tuple)):
        if depth == MAX_DEPTH:
            spend_on_all(value)  # This raises the error.
        _spell_items(value, pieces, depth)
    else:
        # Templates print no other objects, whose texts would have no limit.
        pieces.append(f"<{type(value).__name__}>")


def _spell_items(
    value: Mapping[object, object] | list[object] | tuple[object, ...],
    pieces: list[str],
    depth: int,
) -> None:
    ends = "{}" if isinstance(value, Mapping) else "[]" if isinstance(value, list) else "()"
    pieces.append(ends[0])
    for i, item in enumerate(value):
        if i > 0:
            pieces.append(", ")
        _spell(item, pieces, depth + 1)
        if isinstance(value, Mapping):
            pieces.append(": ")
            _spell(value[item], pieces, depth + 1)
    if isinstance(value, tuple) and len(value) == 1:
        pieces.append(",")
    pieces.append(ends[1])
