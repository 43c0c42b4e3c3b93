"""The filters of jinja that make texts, with the author of each character and within limits."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from textwrap import TextWrapper

from jinja2 import filters, pass_environment
from jinja2.environment import Environment
from jinja2.runtime import Undefined

from ._attributes import only_attribute_of
from ._formatting import percent
from ._json import to_json
from ._limits import check_number, spend, spend_on_all, spend_on_size
from ._values import GivenInt, Group, number_from, text_of
from ._written import TEMPLATE, USER, Text


_FEW = 1000
_WORDS = re.compile(r"([-\s({\[<]+)")


def _upper(value: object) -> Text:
    return text_of(value).upper()


def _lower(value: object) -> Text:
    return text_of(value).lower()


def _capitalize(value: object) -> Text:
    return text_of(value).capitalize()


def _title(value: object) -> Text:
    words = _WORDS.split(str.__str__(text_of(value)))
    text, start, pieces = text_of(value), 0, []
    for word in words:
        part = text[start : start + len(word)]
        pieces.append(part[:1].upper() + part[1:].lower())
        start += len(word)
    return Text("").join(pieces)


def _trim(value: object, chars: str | None = None) -> Text:
    return text_of(value).strip(chars)


def _replace(value: object, old: object, new: object, count: int | None = None) -> Text:
    return text_of(value).replace(text_of(old), text_of(new), -1 if count is None else count)


def _center(value: object, width: int = 80) -> Text:
    return text_of(value).center(width)


def _indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    step = Text.of(width) if isinstance(width, str) else Text(" ", TEMPLATE) * width
    text = text_of(value)
    newline = Text("\n", text.author())  # the newlines of the text, or new ones
    text += newline
    lines = text.splitlines()
    if blank:
        indented = (newline + step).join(lines)
    else:
        indented = newline.join(
            [line if i == 0 or not line else step + line for i, line in enumerate(lines)]
        )
    return step + indented if first else indented


def _truncate(
    value: object,
    length: int = 255,
    killwords: bool = False,
    end: str = "...",
    leeway: int | None = None,
) -> Text:
    text = text_of(value)
    end = Text("...", TEMPLATE) if end == "..." else Text.of(end)
    if length < len(end) or (leeway is not None and leeway < 0):
        raise ValueError("truncate expects a length of at least that of its end, and a leeway")
    if len(text) <= length + (5 if leeway is None else leeway):
        return text
    kept = text[: length - len(end)]
    return (kept if killwords else Text.of(kept.rsplit(" ", 1)[0])) + end


def _wordwrap(
    value: object,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> Text:
    """Wraps lines; the breaks that the wrapper makes lose sight of authors within a line."""
    wrapper = TextWrapper(
        width=width,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=break_long_words,
        break_on_hyphens=break_on_hyphens,
    )
    text = text_of(value)
    between = Text("\n", text.author()) if wrapstring is None else Text.of(wrapstring)
    lines: list[str] = []
    for line in text.splitlines():
        wrapped = wrapper.wrap(str.__str__(line))
        lines.append(between.join(Text(part, Text.of(line).author()) for part in wrapped))
    return between.join(lines)


@pass_environment
def _join(
    environment: Environment,
    value: Iterable[object],
    d: object = "",
    attribute: str | int | None = None,
) -> Text:
    items = list(value)
    if attribute is not None:
        items = list(map(filters.make_attrgetter(environment, attribute), items))
    return text_of(d).join(map(text_of, items))


@pass_environment
def _sum(
    environment: Environment,
    iterable: Iterable[object],
    attribute: str | int | None = None,
    start: object = 0,
) -> object:
    items = list(iterable)
    if attribute is not None:
        items = list(map(filters.make_attrgetter(environment, attribute), items))
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
    for item in items:
        start = number_from(start + item, start, item)  # pyright: ignore
        spend_on_size(start)
        check_number(start)
    return start


def _abs(value: int | float) -> object:
    return number_from(abs(value), value)


def _round(value: int | float, precision: int = 0, method: str = "common") -> object:
    if abs(precision) > _FEW:
        raise ValueError(f"round takes a precision within {_FEW} digits")
    rounded = filters.do_round(value, precision, method)  # pyright: ignore[reportArgumentType]
    return number_from(rounded, value)


def _int(value: object, default: int = 0, base: int = 10) -> int:
    plain = str.__str__(value) if isinstance(value, str) else value
    number = filters.do_int(plain, default, base)
    # The digits of the text remain the user's. Other numbers do not know whose they are.
    is_given = Text.of(value).author() == USER if isinstance(value, str) else type(value) is not int
    return GivenInt(number) if is_given else number


def _batch(value: Iterable[object], linecount: int, fill_with: object = None) -> Iterable[object]:
    spend(linecount)
    return iter(list(filters.do_batch(value, linecount, fill_with)))  # pyright: ignore


def _slice(value: Iterable[object], slices: int, fill_with: object = None) -> Iterable[object]:
    spend(slices)
    return iter(list(filters.sync_do_slice(value, slices, fill_with)))  # pyright: ignore


@pass_environment
def _groupby(
    environment: Environment,
    value: Iterable[object],
    attribute: str | int,
    default: object = None,
    case_sensitive: bool = False,
) -> list[Group]:
    items = list(value)
    spend_on_all(items)
    groups = filters.sync_do_groupby(environment, items, attribute, default, case_sensitive)
    return [Group(*group) for group in groups]


def _escape(value: object) -> Text:
    text = text_of(value)
    for char, entity in zip("&><'\"", ("&amp;", "&gt;", "&lt;", "&#39;", "&#34;"), strict=True):
        text = text.replace(char, Text(entity, TEMPLATE))
    return text


def _random(seq: Sequence[object]) -> object:
    return random.choice(seq) if seq else Undefined("No random item, sequence was empty.")


def _format(value: object, *arguments: object, **named: object) -> Text:
    if arguments and named:
        raise ValueError("can't handle positional and keyword arguments at the same time")
    return percent(text_of(value), named or arguments)


_AS_IN_JINJA = (
    "count d default dictsort filesizeformat first float items last length list map max min "
    "pprint reject rejectattr reverse select selectattr sort striptags unique urlencode urlize "
    "wordcount xmlattr"
)
FILTERS: dict[str, Callable[..., object]] = {
    **{name: filters.FILTERS[name] for name in _AS_IN_JINJA.split()},
    "abs": _abs,
    "attr": only_attribute_of,
    "batch": _batch,
    "capitalize": _capitalize,
    "center": _center,
    "e": _escape,
    "escape": _escape,
    "forceescape": _escape,
    "format": _format,
    "groupby": _groupby,
    "indent": _indent,
    "int": _int,
    "join": _join,
    "lower": _lower,
    "random": _random,
    "replace": _replace,
    "round": _round,
    "safe": text_of,
    "slice": _slice,
    "string": text_of,
    "sum": _sum,
    "title": _title,
    "tojson": to_json,
    "trim": _trim,
    "truncate": _truncate,
    "upper": _upper,
    "wordwrap": _wordwrap,
}
