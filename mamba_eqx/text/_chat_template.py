"""Chat templates: jinja2 programs that lay out a conversation as text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


# A mark is inserted into the messages after the first character of everything that is spelled like
# a special token. Special tokens in the rendered text were therefore written by the template and
# not by a user. All marks are removed from the result.
_MARK = "\ue0f5"


class Piece(NamedTuple):
    """A part of a rendered conversation: plain text, or the spelling of one special token."""

    text: str
    is_special: bool


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, object],
    *,
    special: Sequence[str],
    add_generation_prompt: bool,
) -> list[Piece]:
    """Renders a conversation with a chat template.

    **Arguments:**

    - `template`: the jinja2 source. It runs in a sandbox and can access only its arguments.
    - `messages`: the conversation; each message has a `role` and a `content`.
    - `variables`: further variables of the template, such as `bos_token`.
    - `special`: the spellings of the special tokens.
    - `add_generation_prompt`: whether to append the beginning of an assistant's message.

    **Returns:**

    The text in pieces. Only pieces that the template itself wrote can be special.

    **Raises:** `ValueError` if a message is malformed, or the template rejects the conversation or
    fails; `ImportError` if `jinja2` is not installed.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            'Chat templates require the package `jinja2`: pip install "mamba_eqx[text]".'
        ) from error
    for i, message in enumerate(messages):
        fits = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not fits or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(
                f"messages[{i}] must have a `role` and a `content`, both strings, but got "
                f"{message!r}."
            )

    def refuse(message: str) -> None:
        raise _RefusedError(f"The chat template rejects the conversation: {message}")

    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def mark(text: str) -> str:
        return pattern.sub(lambda m: m[0][0] + _MARK + m[0][1:], text.replace(_MARK, ""))

    marked = [{name: mark(value) for name, value in message.items()} for message in messages]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    try:
        text = environment.from_string(template).render(
            messages=marked,
            add_generation_prompt=add_generation_prompt,
            raise_exception=refuse,
            **variables,
        )
    except _RefusedError:
        raise
    except Exception as error:  # Templates are programs and can raise anything.
        raise ValueError(f"The chat template failed: {error}.") from error
    pieces: list[Piece] = []
    start = 0
    for match in pattern.finditer(text):
        pieces += [Piece(text[start : match.start()], False), Piece(match[0], True)]
        start = match.end()
    pieces.append(Piece(text[start:], False))
    return [Piece(text.replace(_MARK, ""), special) for text, special in pieces if text]


class _RefusedError(ValueError):
    """The template has called `raise_exception`."""


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
