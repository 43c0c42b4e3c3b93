"""The operators of templates, within limits."""

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ._formatting import percent
from ._limits import (
    MAX_BITS,
    TemplateLimitError,
    check_number,
    spend,
    spend_on_all,
    spend_on_size,
)
from ._values import number_from
from ._written import Text


def _add(left: Any, right: Any) -> object:
    spend_on_size(left)
    spend_on_size(right)
    if isinstance(left, str) and isinstance(right, str):
        return Text.of(left) + right
    return operator.add(left, right)


def _multiply(left: Any, right: Any) -> object:
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str) and isinstance(times, int):
            return Text.of(items) * times
        if isinstance(items, (list, tuple)) and isinstance(times, int):
            spend(len(items) * max(0, times))
    return operator.mul(left, right)


def _modulo(left: Any, right: Any) -> object:
    return percent(left, right) if isinstance(left, str) else operator.mod(left, right)


def _power(left: Any, right: Any) -> object:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if bits > 1 and bits * right > MAX_BITS:
            raise TemplateLimitError(f"it makes an integer of more than {MAX_BITS} bits")
    return operator.pow(left, right)


_BINARY: dict[str, Callable[[Any, Any], object]] = {
    "+": _add,
    "-": operator.sub,
    "*": _multiply,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": _modulo,
    "**": _power,
}


def binary(symbol: str, left: Any, right: Any) -> object:
    """Returns `left symbol right`."""
    result = _BINARY[symbol](left, right)
    check_number(result)
    return number_from(result, left, right)


def _contains(container: Any, item: Any) -> bool:
    if isinstance(container, str):
        spend_on_size(container)
    elif isinstance(container, dict):
        spend_on_all(item)
    elif isinstance(item, Collection) and not isinstance(item, str):
        spend_on_all(container)
        spend_on_all(item)
    elif isinstance(container, Iterator):
        container = list(container)
        spend(len(container))
    elif not isinstance(container, range):
        spend_on_size(container)
    return item in container  # pyright: ignore[reportOperatorIssue]


_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
}


def compare(name: str, left: object, right: object) -> bool:
    """Returns the comparison with jinja's name `name`."""
    if name in ("in", "notin"):
        return _contains(right, left) is (name == "in")
    if isinstance(left, Collection) and isinstance(right, Collection):
        visit = spend_on_size if isinstance(left, str) else spend_on_all
        visit(left)
        visit(right)
    return _ORDERED[name](left, right)
