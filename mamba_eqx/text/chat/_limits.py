"""The limits of a rendering: of its steps, of its texts, of its numbers and of its depth."""

from collections.abc import Iterator, Mapping, Sequence, Set, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar


# A published template takes 20 to 200 steps for a message, and reads its text a few times, so it
# stays far below these limits. A hostile template reaches them within seconds.
STEPS = 1_000_000
STEPS_PER_MESSAGE = 2_000
MAX_CHARACTERS = 10_000_000  # of one text, of the input, and of the output
MAX_BITS = 4096  # of an integer
MAX_DEPTH = 100  # of values within values
CHARACTERS_PER_STEP = 32


class TemplateLimitError(ValueError):
    """A template that reached a limit."""


class _Steps:
    """The steps that a rendering may still take."""

    def __init__(self, left: int):
        self.left = left
        self.read = 0  # characters of the input


_STEPS: ContextVar[_Steps] = ContextVar("steps of the rendering")


@contextmanager
def limited(messages: int) -> Iterator[None]:
    """Bounds the work of what runs inside.

    **Arguments:**

    - `messages`: the number of messages of the conversation.
    """
    token = _STEPS.set(_Steps(STEPS + STEPS_PER_MESSAGE * messages))
    try:
        yield
    finally:
        _STEPS.reset(token)


def spend(steps: int) -> None:
    """Counts steps. Raises `TemplateLimitError` if there are none left."""
    budget = _STEPS.get()
    budget.left -= steps
    if budget.left < 0:
        raise TemplateLimitError("it takes too many steps")


def allow_for_input(text: str) -> None:
    """Adds steps for a text of the input."""
    budget = _STEPS.get()
    budget.read += len(text)
    check_length(budget.read)
    budget.left += len(text) // 2


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
