"""The steps of a tokenizer that rewrite text, and how much longer they can make it.

Each of many steps can double a text, so that a short `tokenizer.json` could ask for any amount of
memory.
"""

import re
from collections.abc import Iterator, Mapping

from ._rust import checked


_MAX_GROWTH = 10_000
_STEPS = ("normalizers", "pretokenizers", "decoders")
# The characters that the other steps can make of one. Those that are not listed make at most one,
# or a few that they do not multiply again.
_FACTORS = {
    "BertNormalizer": 3,
    "ByteLevel": 4,
    "CTC": 3,
    "NFC": 4,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Precompiled": 18,
}
_PROBE = "\ue000"
_ZERO_WIDTH = re.compile(r"\(\?<?[=!]|\\[bBAzZGkK]|[\^$]")


def steps_of(entry: object) -> Iterator[Mapping[str, object]]:
    """Yields the steps of a normalizer, a pre-tokenizer or a decoder, in their order.

    **Arguments:**

    - `entry`: an entry of `tokenizer.json`.
    """
    waiting = [entry]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, Mapping):
            continue
        inner = next((step[name] for name in _STEPS if isinstance(step.get(name), list)), None)
        if isinstance(inner, list):
            waiting += reversed(inner)
        else:
            yield step


def check_growth(name: str, entry: object) -> None:
    """Checks that an entry of `tokenizer.json` cannot make a text very much longer.

    **Arguments:**

    - `name`: the name of the entry, for the message.
    - `entry`: a normalizer, a pre-tokenizer or a decoder.

    **Raises:** `ValueError` if it can.
    """
    growth = _growth([*steps_of(entry)])
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"its `{name}` must not make a text more than {_MAX_GROWTH:,} times longer, but it can "
            "do so. Use the file of the model's publisher"
        )


def _growth(steps: list[Mapping[str, object]]) -> float:
    """Returns a bound of the number of characters that steps make of one.

    From the last step to the first, it follows how many characters each character becomes in the
    end: only a replacement whose text contains what a later one replaces is multiplied.
    """
    ends: dict[str, float] = {}
    other = 1.0  # for the characters that are not in `ends`
    for step in reversed(steps):
        kind, pattern, content = step.get("type"), step.get("pattern"), step.get("content")
        most = max([other, *ends.values()])
        if kind != "Replace" or not isinstance(pattern, Mapping) or not isinstance(content, str):
            factor = _FACTORS.get(kind, 1) if isinstance(kind, str) else 1
            ends, other = {}, most * factor
            continue
        new = sum(ends.get(char, other) for char in content)
        replaced = pattern.get("String")
        if isinstance(replaced, str) and replaced:
            share = new / len(replaced)
            ends |= {char: max(share, ends.get(char, other)) for char in replaced}
        else:
            ends, other = {}, most + new if _inserts(pattern.get("Regex")) else max(most, new)
    return max([other, *ends.values()])


def _inserts(pattern: object) -> bool:
    """Returns whether a regular expression may match between two characters."""
    if not isinstance(pattern, str) or _ZERO_WIDTH.search(pattern) is not None:
        return True
    from tokenizers import Regex, normalizers

    def replaced() -> str:
        return normalizers.Replace(Regex(pattern), "x").normalize_str(_PROBE)

    return checked(replaced, "it has an invalid regular expression") not in ("x", _PROBE)
