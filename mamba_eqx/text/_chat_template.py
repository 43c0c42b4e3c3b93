"""Templates of conversations."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


# Put into what users write, behind the first letter of whatever looks like a special token; then
# what still looks like one was written by the template. Taken out again in the end.
_MARK = "\ue0f5"


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    words: Mapping[str, str],
    *,
    special: Sequence[str],
    add_generation_prompt: bool,
) -> list[tuple[str, bool]]:
    """A conversation as pieces, each with whether it is a special token.

    **Arguments:**

    - `template`: in jinja2. It runs in a sandbox: it cannot reach anything but what it is given.
    - `words`: other variables, such as `bos_token`.
    - `special`: the spellings of special tokens.

    **Raises:** `ValueError` if the messages are not such, or the template refuses them or fails.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            'Templates of conversations need the package `jinja2`: pip install "mamba-eqx[text]".'
        ) from error
    for i, message in enumerate(messages):
        fits = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not fits or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(
                f"messages[{i}] must have a `role` and a `content`, both strings, but is "
                f"{message!r}."
            )

    def refuse(message: str) -> None:
        raise _RefusedError(f"The template refuses the conversation: {message}")

    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    mark = lambda text: pattern.sub(lambda m: m[0][0] + _MARK + m[0][1:], text)
    safe = [
        {name: mark(value.replace(_MARK, "")) for name, value in message.items()}
        for message in messages
    ]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    try:
        text = environment.from_string(template).render(
            messages=safe,
            add_generation_prompt=add_generation_prompt,
            raise_exception=refuse,
            **words,
        )
    except _RefusedError:
        raise
    except Exception as error:  # Any: templates are programs.
        raise ValueError(f"The template of conversations fails: {error}.") from error
    pieces: list[tuple[str, bool]] = []
    at = 0
    for match in pattern.finditer(text):
        pieces += [(text[at : match.start()], False), (match[0], True)]
        at = match.end()
    pieces.append((text[at:], False))
    return [(piece.replace(_MARK, ""), is_special) for piece, is_special in pieces if piece]


class _RefusedError(ValueError):
    pass


def _to_json(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
