"""The filter `tojson`."""

import json
from collections.abc import Mapping, Sequence

from ._limits import MAX_DEPTH, check_length, spend, spend_on_all
from ._written import TEMPLATE, USER, Text


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> Text:
    """Returns `json.dumps` of a value. What stands around the texts is as much the user's as they
    are, since the user decides how values nest."""
    step = None if indent is None else " " * _bounded(indent) if isinstance(indent, int) else indent
    between, colon = separators or (", " if step is None else ",", ": ")
    pieces: list[str] = []

    def write(item: object, depth: int) -> None:
        spend(1)
        if depth > MAX_DEPTH:
            spend_on_all(value)  # This raises the error.
        if isinstance(item, str):
            pieces.append(_quoted(item, ensure_ascii))
        elif isinstance(item, Mapping) and item:
            keys = sorted(item) if sort_keys else item
            write_all("{}", [(key, item[key]) for key in keys], depth)
        elif isinstance(item, (list, tuple)) and item:
            write_all("[]", [(None, other) for other in item], depth)
        else:
            pieces.append(json.dumps(item))

    def write_all(brackets: str, items: list[tuple[object, object]], depth: int) -> None:
        check_length(len(step or "") * (depth + 1))
        newline = None if step is None else "\n" + step * (depth + 1)
        pieces.append(brackets[0])
        for i, (key, item) in enumerate(items):
            pieces.extend([between] if i > 0 else [])
            pieces.extend([] if newline is None else [newline])
            if brackets == "{}":
                pieces.extend([_key(key, ensure_ascii), colon])
            write(item, depth + 1)
        if step is not None:
            pieces.append("\n" + step * depth)
        pieces.append(brackets[1])

    write(value, 0)
    return Text("").join(pieces)


def _bounded(indent: int) -> int:
    check_length(indent)
    return indent


def _key(key: object, ensure_ascii: bool) -> Text:
    if isinstance(key, str):
        return _quoted(key, ensure_ascii)
    if key is None or isinstance(key, (bool, int, float)):
        return Text(f'"{json.dumps(key)}"')
    raise TypeError(f"keys must be str, int, float, bool or None, not {type(key).__name__}")


def _quoted(text: str, ensure_ascii: bool) -> Text:
    """Returns a text in quotes. Each part that has one author is escaped on its own."""
    text = Text.of(text)
    quotes = Text('"', TEMPLATE if text.author() == TEMPLATE else USER)
    plain = str.__str__(text)
    pieces: list[str] = [quotes]
    for start, stop in text.runs():
        escaped = json.dumps(plain[start:stop], ensure_ascii=ensure_ascii)
        pieces.append(Text(escaped[1:-1], text.authors[start]))
    return Text("").join([*pieces, quotes])
