"""The attributes and items of values that are safe to use in a template."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import NamedTuple

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import Cycler

from ._limits import spend_on_all, spend_on_size
from ._values import Group, Namespace, number_from, text_of
from ._written import Text


class Method(NamedTuple):
    """A method of a value, which a template can call."""

    function: Callable[..., object]
    value: object


class Format(NamedTuple):
    """The method `format` of a text, or `format_map`."""

    text: Text
    takes_mapping: bool


def attribute_of(value: object, name: str) -> object:
    """Returns what `value.name` is in a template: an attribute, or else an item."""
    found, attribute = _attribute(value, name)
    if found:
        return attribute
    found, item = _item(value, name)
    return item if found else _undefined(value, name)


def item_of(value: object, key: object) -> object:
    """Returns what `value[key]` is in a template: an item, or else an attribute."""
    found, item = _item(value, key)
    if found:
        return item
    found, attribute = _attribute(value, key) if isinstance(key, str) else (False, None)
    return attribute if found else _undefined(value, key)


def only_attribute_of(value: object, name: object) -> object:
    """Returns what `value|attr(name)` is in a template."""
    found, attribute = _attribute(value, text_of(name))
    return attribute if found else _undefined(value, name)


def _item(value: object, key: object) -> tuple[bool, object]:
    if isinstance(value, Undefined):
        return True, value[key]  # This raises the error.
    spend_on_all(key)
    if not isinstance(value, (str, Mapping, list, tuple, range)):
        return False, None
    try:
        item = value[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (TypeError, LookupError):
        return False, None
    if isinstance(key, slice):
        spend_on_size(item)
    return True, Text.of(item) if isinstance(item, str) else item


def _attribute(value: object, name: str) -> tuple[bool, object]:
    if isinstance(value, Undefined):
        return True, value[name]  # This raises the error.
    if isinstance(value, Namespace):
        return name in value.attributes, value.attributes.get(name)
    if isinstance(value, str):
        value = Text.of(value)
        if name in ("format", "format_map"):
            return True, Format(value, name == "format_map")
    for kind, members in _MEMBERS:
        if isinstance(value, kind):
            if name in members.methods:
                return True, Method(members.methods[name], value)
            if name in members.fields:
                return True, number_from(attrgetter(name)(value), value)
            if name in dir(kind):
                return True, Undefined(
                    f"access to attribute {name!r} of {_kind(value)!r} is unsafe",
                    exc=SecurityError,
                )
    return False, None


def _undefined(value: object, name: object) -> Undefined:
    shown = repr(name) if isinstance(name, (str, int)) else _kind(name)
    return Undefined(f"{_kind(value)} object has no attribute {shown}")


def _kind(value: object) -> str:
    return "str" if isinstance(value, str) else type(value).__name__


def _list_index(items: list[object], *args: object) -> int:
    spend_on_all([items, args])
    return items.index(*args)  # pyright: ignore[reportArgumentType]


def _list_count(items: list[object], item: object) -> int:
    spend_on_all([items, item])
    return items.count(item)


def _join(separator: Text, parts: Iterable[str]) -> Text:
    spend_on_size(parts)
    return separator.join(parts)


def _get(items: dict[object, object], key: object, default: object = None) -> object:
    spend_on_all(key)
    return items.get(key, default)


def _changed(loop: LoopContext, *values: object) -> bool:
    spend_on_all(values)
    return loop.changed(*values)


class _Members(NamedTuple):
    """The methods and the other attributes of a type."""

    methods: Mapping[str, Callable[..., object]] = {}
    fields: tuple[str, ...] = ()


_TEXT = {
    "capitalize": Text.capitalize,
    "casefold": Text.casefold,
    "center": Text.center,
    "count": str.count,
    "endswith": str.endswith,
    "expandtabs": Text.expandtabs,
    "find": str.find,
    "index": str.index,
    "isalnum": str.isalnum,
    "isalpha": str.isalpha,
    "isascii": str.isascii,
    "isdecimal": str.isdecimal,
    "isdigit": str.isdigit,
    "isidentifier": str.isidentifier,
    "islower": str.islower,
    "isnumeric": str.isnumeric,
    "isprintable": str.isprintable,
    "isspace": str.isspace,
    "istitle": str.istitle,
    "isupper": str.isupper,
    "join": _join,
    "ljust": Text.ljust,
    "lower": Text.lower,
    "lstrip": Text.lstrip,
    "partition": Text.partition,
    "removeprefix": Text.removeprefix,
    "removesuffix": Text.removesuffix,
    "replace": Text.replace,
    "rfind": str.rfind,
    "rindex": str.rindex,
    "rjust": Text.rjust,
    "rpartition": Text.rpartition,
    "rsplit": Text.rsplit,
    "rstrip": Text.rstrip,
    "split": Text.split,
    "splitlines": Text.splitlines,
    "startswith": str.startswith,
    "strip": Text.strip,
    "swapcase": Text.swapcase,
    "title": Text.title,
    "upper": Text.upper,
    "zfill": Text.zfill,
}
_LOOP = "index index0 revindex revindex0 first last length depth depth0 previtem nextitem"
_SEQUENCE = {"index": _list_index, "count": _list_count}
_NUMBER = ("real", "imag", "numerator", "denominator")
# The first type that fits decides. Methods that change a value are left out, as in jinja's own
# sandbox, which a message that has a field of such a name notices too.
_MEMBERS: list[tuple[type, _Members]] = [
    (str, _Members(_TEXT)),
    (
        dict,
        _Members(
            {"get": _get, "items": dict.items, "keys": dict.keys, "values": dict.values}
            | {"copy": dict.copy}
        ),
    ),
    (list, _Members(_SEQUENCE | {"copy": list.copy})),
    (Group, _Members(_SEQUENCE, ("grouper", "list"))),
    (tuple, _Members(_SEQUENCE)),
    (range, _Members(fields=("start", "stop", "step"))),
    (float, _Members({"is_integer": float.is_integer}, ("real", "imag"))),
    (int, _Members({"bit_length": int.bit_length}, _NUMBER)),
    (
        LoopContext,
        _Members({"cycle": LoopContext.cycle, "changed": _changed}, tuple(_LOOP.split())),
    ),
    (Cycler, _Members({"next": Cycler.next, "reset": Cycler.reset}, ("current",))),
    (Macro, _Members(fields=("name", "arguments", "catch_kwargs", "catch_varargs", "caller"))),
]
