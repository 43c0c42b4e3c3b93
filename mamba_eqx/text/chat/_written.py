"""Texts that know who wrote each character."""

import re
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

from ._limits import CHARACTERS_PER_STEP, check_length, spend


# The authors of a character, by trust. The lowest is the default, so that an operation that loses
# sight of an author can only make a text less trusted.
USER = 0
# Short names that complete what a template writes (the role in `<|user|>`, the number in `<|1|>`),
# but that alone mean nothing.
LABEL = 1
TEMPLATE = 2
_RUN = re.compile(rb"\x00+|\x01+|\x02+")


class Text(str):
    """A string with the author of each character, which its operations preserve."""

    __slots__ = ("authors",)
    authors: bytes

    def __new__(cls, text: str, authors: bytes | int = USER) -> "Text":
        """**Arguments:**

        - `text`: the characters.
        - `authors`: the author of each, or of all.
        """
        self = super().__new__(cls, text)
        length = len(text)
        check_length(length)
        spend(1 + length // CHARACTERS_PER_STEP)
        self.authors = bytes((authors,)) * length if isinstance(authors, int) else authors
        assert len(self.authors) == length
        return self

    @classmethod
    def of(cls, text: str) -> "Text":
        """Returns `text`, as written by the user if it does not say by whom."""
        return text if isinstance(text, Text) else cls(str.__str__(text))

    def author(self) -> int:
        """Returns the least trusted author."""
        return min(self.authors, default=TEMPLATE)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields the beginning and the end of each part that has one author."""
        return (match.span() for match in _RUN.finditer(self.authors))

    def _same(self, text: str) -> "Text":
        """Returns `text`, which an operation has made of this one character by character."""
        return Text(text, self.authors if len(text) == len(self) else self.author())

    def _parts(self, parts: list[str], gap: int | None) -> list[str]:
        """Returns texts that follow each other in this one, `gap` characters apart, or as many
        white ones as there are."""
        spend(len(parts))
        found: list[str] = []
        start = 0
        for part in parts:
            if gap is None:
                start = str.index(self, part, start)
            found.append(Text(part, self.authors[start : start + len(part)]))
            start += len(part) + (gap or 0)
        return found

    def __str__(self) -> "Text":
        return self

    def __add__(self, other: str) -> "Text":
        if not isinstance(other, str):
            return NotImplemented
        check_length(len(self) + len(other))
        return Text(super().__add__(other), self.authors + Text.of(other).authors)

    def __radd__(self, other: str) -> "Text":
        return Text.of(other) + self

    def __mul__(self, times: SupportsIndex) -> "Text":
        check_length(len(self) * max(0, times.__index__()))
        return Text(super().__mul__(times), self.authors * times)

    def __rmul__(self, times: SupportsIndex) -> "Text":
        return self * times

    def __mod__(self, arguments: object) -> str:
        raise TypeError("texts are formatted elsewhere, within limits")

    def __getitem__(self, key: "SupportsIndex | slice") -> "Text":
        text = super().__getitem__(key)
        authors = self.authors[key]
        return Text(text, authors)

    def __iter__(self) -> Iterator["Text"]:
        return map(Text, super().__iter__(), iter(self.authors))

    def join(self, parts: Iterable[str], /) -> "Text":
        spelled = list(parts)
        check_length(sum(map(len, spelled)) + len(self) * max(0, len(spelled) - 1))
        text = super().join(spelled)
        return Text(text, self.authors.join(Text.of(part).authors for part in spelled))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().split(sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().rsplit(sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._parts(super().splitlines(True), 0)
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, _ = super().partition(sep)
        start, stop = len(before), len(before) + len(middle)
        return self[:start], self[start:stop], self[stop:]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, _ = super().rpartition(sep)
        start, stop = len(before), len(before) + len(middle)
        return self[:start], self[start:stop], self[stop:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Text":
        if len(old) > 0:
            return Text.of(new).join(self.split(old, count))
        # An empty text is found before each character and at the end.
        places = len(self) + 1 if count.__index__() < 0 else min(count.__index__(), len(self) + 1)
        check_length(len(self) + places * len(new))
        pieces = [piece for char in self[: max(0, places - 1)] for piece in (new, char)]
        rest = self[max(0, places - 1) :]
        return Text("").join([*pieces, *([new] if places > 0 else []), rest])

    def strip(self, chars: str | None = None, /) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Text":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Text":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "Text":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> "Text":
        return self[: len(super().removesuffix(suffix))]

    def center(self, width: SupportsIndex, fillchar: str | None = None, /) -> "Text":
        room = max(0, width.__index__() - len(self))
        left = room // 2 + (room & width.__index__() & 1)
        return self.pad(left, room - left, fillchar)

    def ljust(self, width: SupportsIndex, fillchar: str | None = None, /) -> "Text":
        return self.pad(0, max(0, width.__index__() - len(self)), fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str | None = None, /) -> "Text":
        return self.pad(max(0, width.__index__() - len(self)), 0, fillchar)

    def pad(self, left: int, right: int, fillchar: str | None) -> "Text":
        """Returns the text with fill characters, spaces by default, around it."""
        fill = Text(" ", TEMPLATE) if fillchar is None else Text.of(fillchar)
        if len(fill) != 1:
            raise TypeError("The fill character must be exactly one character long")
        return fill * left + self + fill * right

    def zfill(self, width: SupportsIndex, /) -> "Text":
        check_length(width.__index__())
        return self._same(super().zfill(width))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> "Text":
        check_length(len(self) + str.count(self, "\t") * max(0, tabsize.__index__()))
        return self._same(super().expandtabs(tabsize))

    def upper(self) -> "Text":
        return self._same(super().upper())

    def lower(self) -> "Text":
        return self._same(super().lower())

    def casefold(self) -> "Text":
        return self._same(super().casefold())

    def swapcase(self) -> "Text":
        return self._same(super().swapcase())

    def capitalize(self) -> "Text":
        return self._same(super().capitalize())

    def title(self) -> "Text":
        return self._same(super().title())
