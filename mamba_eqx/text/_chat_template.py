"""Chat templates: jinja2 programs that lay out a conversation as text."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a rendered conversation: plain text, or the spelling of one special token."""

    text: str
    is_special: bool


class Tokens(NamedTuple):
    """Added tokens that a tokenizer looks for at the same time: the first in the text, and the
    longest at its place."""

    special: Collection[str]
    ordinary: Collection[str] = ()


def named_templates(templates: object) -> dict[str, str]:
    """Reads the `chat_template` of a tokenizer's config: one template, or several by name.

    **Arguments:**

    - `templates`: the source of a template; a list of objects that have a `name` and a `template`;
        an object of templates by name; or `None`.

    **Returns:**

    The templates by name. A single template is named `"default"`.

    **Raises:** `ValueError` if `templates` is anything else.
    """
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    pairs: list[tuple[object, object]] = []
    if isinstance(templates, Mapping):
        pairs = list(templates.items())
    elif isinstance(templates, list) and all(isinstance(entry, Mapping) for entry in templates):
        pairs = [(entry.get("name"), entry.get("template")) for entry in templates]
    named = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}
    if not pairs or len(named) < len(pairs):
        raise ValueError(
            "`chat_template` must be a template, a list of objects with a `name` and a `template`, "
            f"or an object of templates by name, but got {_shortened(templates)}. Correct the "
            "tokenizer's config."
        )
    return named


def chosen_template(templates: Mapping[str, str], *, with_tools: bool) -> str | None:
    """Returns the template for a conversation: `"tool_use"` if there are tools, or `"default"`.

    **Arguments:**

    - `templates`: the templates by name.
    - `with_tools`: whether tools are given.

    **Returns:**

    The source of the template, or `None` if there is none for such a conversation.
    """
    default = templates.get("default")
    return templates.get("tool_use", default) if with_tools else default


def render(
    template: str,
    messages: Sequence[Mapping[str, object]],
    variables: Mapping[str, object],
    *,
    tokens: Sequence[Tokens],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, object]] | None = None,
    documents: Sequence[Mapping[str, object]] | None = None,
    options: Mapping[str, object] | None = None,
) -> list[Piece]:
    """Renders a conversation with a chat template.

    **Arguments:**

    - `template`: the jinja2 source. An interpreter with limits of work and size runs it, and it can
        access only its arguments.
    - `messages`: the conversation; each message has a `role` and a `content`.
    - `variables`: further variables of the template, such as `bos_token`. They count as written by
        the template.
    - `tokens`: the added tokens, in the order in which the tokenizer looks for them: those of the
        second entry only in text in which it found none of the first.
    - `add_generation_prompt`: whether to append the beginning of an assistant's message.
    - `tools`: descriptions of the tools that the model can call.
    - `documents`: documents that the model can cite.
    - `options`: variables of the template that the caller sets, such as `enable_thinking`.

    **Returns:**

    The text in pieces. A piece is special only if the template itself wrote it.

    **Raises:** `ValueError` if an argument is malformed, or the template rejects the conversation,
    fails, or reaches a limit; `ImportError` if `jinja2` is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'Chat templates require the package `jinja2`: pip install "mamba_eqx[text]".'
        ) from error
    from .chat import render_text

    given = {"tools": tools, "documents": documents, **(options or {})}
    for name in {"messages", "add_generation_prompt"} & given.keys():
        raise ValueError(f"`options` must not contain `{name}`. Use the argument of that name.")
    written = {"add_generation_prompt": add_generation_prompt, **variables}
    written = {name: value for name, value in written.items() if name not in (options or {})}
    text = render_text(template, messages, written=written, variables=given)
    return _pieces(str.__str__(text), text.authors, tokens)


def _pieces(text: str, authors: bytes, tokens: Sequence[Tokens]) -> list[Piece]:
    """Splits a rendered text at the special tokens that its template wrote.

    As in the tokenizer, the first token comes first, and the longest at its place.
    """
    found = dict[int, int]()  # The end of each token, by its start.
    for stage in tokens:
        spans = [0, *(place for span in sorted(found.items()) for place in span), len(text)]
        find = _finder({*stage.special, *stage.ordinary} - {""})
        for start, stop in zip(spans[::2], spans[1::2], strict=True):
            found |= _written_tokens(find, text, authors, start, stop)
    known = {content for stage in tokens for content in stage.special}
    pieces: list[Piece] = []
    start = 0  # of the text that is in no piece
    for first, last in sorted(found.items()):
        if text[first:last] in known:
            pieces += [Piece(text[start:first], False), Piece(text[first:last], True)]
            start = last
    pieces.append(Piece(text[start:], False))
    return [piece for piece in pieces if piece.text]


_Find = Callable[[str, int, int], tuple[int, int] | None]


def _written_tokens(
    find: _Find, text: str, authors: bytes, start: int, stop: int
) -> dict[int, int]:
    """Returns the places of the tokens in a part of a text, without those that a user wrote."""
    from .chat import TEMPLATE, USER

    places = dict[int, int]()
    for run in re.compile(b"[^%c]+" % USER).finditer(authors, start, stop):
        position = run.start()
        while (found := find(text, position, run.end())) is not None:
            first, last = found
            # A role or a number alone is no token, although the template printed it.
            written = TEMPLATE in authors[first:last]
            position = last if written else first + 1
            if written:
                places[first] = last
    return places


def _finder(tokens: Set[str]) -> _Find:
    """Returns a function that finds the first token in a part of a text, and the longest there.

    A regular expression of all tokens would try each of them at each place.
    """
    lengths: dict[str, set[int]] = {}
    for token in tokens:
        lengths.setdefault(token[0], set()).add(len(token))
    longest_first = {char: sorted(found, reverse=True) for char, found in lengths.items()}
    begins = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else "(?!)")

    def find(text: str, start: int, stop: int) -> tuple[int, int] | None:
        for match in begins.finditer(text, start, stop):
            first = match.start()
            for length in longest_first[match[0]]:
                if first + length <= stop and text[first : first + length] in tokens:
                    return first, first + length
        return None

    return find


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
