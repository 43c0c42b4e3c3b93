"""Formatting: the operator `%` and the method `format` of texts."""

import re
from collections.abc import Mapping, Sequence

from jinja2.sandbox import SandboxedFormatter

from ._limits import check_length, check_number
from ._values import repr_of, text_of
from ._written import Text


_PERCENT = re.compile(
    r"%(?:\(([^()]*)\))?([#0\- +]*)(\*|\d+)?(?:\.(\*|\d*))?[hlL]?([diouxXeEfFgGcrsa%])"
)
_ALIGNED = re.compile(r"(?:(.)?([<>^]))?(\d+)?(?:\.(\d+))?s?", re.DOTALL)
_DIGITS = re.compile(r"\d+")


def percent(text: str, arguments: object) -> Text:
    """Returns `text % arguments`."""
    text = Text.of(text)
    values = list(arguments) if isinstance(arguments, tuple) else [arguments]
    used = 0

    def take() -> object:
        nonlocal used
        if used == len(values):
            raise TypeError("not enough arguments for format string")
        used += 1
        return values[used - 1]

    def size(spelled: str | None) -> int | None:
        if spelled is None:
            return None
        number = take() if spelled == "*" else int(spelled or 0)
        if not isinstance(number, int):
            raise TypeError("* wants int")
        check_length(abs(number))
        return number

    pieces: list[str] = []
    start = 0
    while (where := str.find(text, "%", start)) >= 0:
        match = _PERCENT.match(text, where)
        if match is None:
            raise ValueError(f"unsupported format character at index {where}")
        pieces.append(text[start:where])
        start = match.end()
        name, flags, width, precision, kind = match.groups()
        if kind == "%":
            pieces.append(text[start - 1 : start])
            continue
        if name is not None:
            if not isinstance(arguments, Mapping):
                raise TypeError("format requires a mapping")
            used = len(values)
        columns, digits = size(width), size(precision)
        value = take() if name is None else arguments[name]  # pyright: ignore
        if kind == "s":
            piece = text_of(value)[:digits]
        elif kind in "ra":
            piece = (repr_of(value) if kind == "r" else _ascii(value))[:digits]
        else:
            check_number(value)
            dot = "" if digits is None else f".{digits}"
            number = f"%{flags}{'' if columns is None else columns}{dot}{kind}" % (value,)
            piece = Text(number, text_of(value).author())
        room = abs(columns or 0)
        left = "-" in flags or (columns or 0) < 0
        pieces.append(piece.ljust(room) if left else piece.rjust(room))
    pieces.append(text[start:])
    if used < len(values) and not (isinstance(arguments, (Mapping, list)) and used == 0):
        raise TypeError("not all arguments converted during string formatting")
    return Text("").join(pieces)


def format_text(
    formatter: SandboxedFormatter,
    text: str,
    arguments: Sequence[object],
    named: Mapping[str, object],
    depth: int = 2,
) -> Text:
    """Returns `text.format(*arguments, **named)`.

    **Arguments:**

    - `formatter`: looks up the fields.
    - `text`: the text with the fields.
    - `arguments`: the positional arguments.
    - `named`: the named arguments.
    - `depth`: how deep fields may stand within the formats of fields.
    """
    if depth < 0:
        raise ValueError("Max string recursion exceeded")
    author = Text.of(text).author()
    pieces: list[str] = []
    number = 0
    for literal, field, specification, conversion in formatter.parse(str.__str__(text)):
        pieces.append(Text(literal, author))
        if field is None:
            continue
        if field == "":
            field, number = str(number), number + 1
        value, _ = formatter.get_field(field, arguments, named)
        if conversion is not None:
            value = {"s": text_of, "r": repr_of, "a": _ascii}[conversion](value)
        specification = format_text(formatter, specification or "", arguments, named, depth - 1)
        pieces.append(_formatted(value, specification))
    return Text("").join(pieces)


def _formatted(value: object, specification: Text) -> Text:
    if not specification:
        return text_of(value)
    for digits in _DIGITS.findall(specification):
        check_length(int(digits))
    match = _ALIGNED.fullmatch(specification)
    if not isinstance(value, str) or match is None:
        check_number(value)
        return Text(format(value, str.__str__(specification)), text_of(value).author())
    fill, align, width, precision = match.groups()
    text = Text.of(value)[: None if precision is None else int(precision)]
    room = max(0, int(width or 0) - len(text))
    # Unlike `str.center`, formats have the odd space on the right.
    left = {"<": 0, ">": room, "^": room // 2}[align or "<"]
    return text.pad(left, room - left, fill)


def _ascii(value: object) -> Text:
    text = repr_of(value)
    return Text(ascii(str.__str__(text))[1:-1], text.author())
