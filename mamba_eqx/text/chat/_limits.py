"""The limits of a rendering: of its steps, of its texts, of its numbers and of its depth."""

from collections.abc import Iterator, Mapping, Sequence, Set, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar


# A published template takes 20 to 200 steps for a message, so these limits allow conversations of
# tens of thousands of messages, or of millions of characters. A hostile template reaches them
# within seconds.
MAX_STEPS = 5_000_000
MAX_CHARACTERS = 10_000_000  # of one text, and of a template's whole output
MAX_BITS = 4096  # of an integer
MAX_DEPTH = 100  # of values within values
CHARACTERS_PER_STEP = 32


class TemplateLimitError(ValueError):
    """A template that reached a limit."""


class _Steps:
    """The steps that a rendering may still take."""

    def __init__(self, left: int):
        self.left = left


_STEPS: ContextVar[_Steps] = ContextVar("steps of the rendering")


@contextmanager
def limited() -> Iterator[None]:
    """Bounds the work of what runs inside."""
    token = _STEPS.set(_Steps(MAX_STEPS))
    try:
        yield
    finally:
        _STEPS.reset(token)


def spend(steps: int) -> None:
    """Counts steps. Raises `TemplateLimitError` if there are none left."""
    budget = _STEPS.get()
    budget.left -= steps
    if budget.left < 0:
        raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps")


def spend_on_size(value: object) -> None:
    """Counts the steps of an operation that visits the characters or the items of `value`."""
    if isinstance(value, str):
        spend(len(value) // CHARACTERS_PER_STEP)
    elif isinstance(value, Sized):
        spend(len(value))


def spend_on_all(value: object) -> None:
    """Counts the steps of an operation that visits everything inside `value`. What is shared
    counts as often as it is reached: comparing, hashing and printing visit it as often."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        spend(1)
        if isinstance(item, str):
            spend(len(item) // CHARACTERS_PER_STEP)
            continue
        if isinstance(item, Mapping):
            inside = [*item.keys(), *item.values()]
        elif isinstance(item, (Sequence, Set, ValuesView)) and not isinstance(item, range):
            inside = list(item)
        else:
            continue
        # The C code that hashes and compares would otherwise overflow the stack.
        if depth == MAX_DEPTH:
            raise TemplateLimitError(f"its values nest deeper than {MAX_DEPTH} levels")
        waiting += [(other, depth + 1) for other in inside]


def check_length(characters: int) -> None:
    """Validates the length of a text that an operation is about to make."""
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")


def check_number(value: object) -> None:
    """Validates the size of a number."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TemplateLimitError(f"it makes an integer of more than {MAX_BITS} bits")
