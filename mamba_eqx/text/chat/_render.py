"""Rendering of a conversation."""

import re
from collections.abc import Mapping, Sequence

from jinja2 import nodes

from ._environment import RefusedError, TemplateEnvironment
from ._limits import TemplateLimitError, limited
from ._statements import Statements
from ._values import given
from ._written import LABEL, TEMPLATE, USER, Text


_MAX_SOURCE = 1_000_000  # characters
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_ROLES = frozenset("assistant developer function model system tool user".split())
# The names under which a message's reasoning is passed; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_text(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    written: Mapping[str, object],
    variables: Mapping[str, object],
) -> Text:
    """Renders a conversation.

    **Arguments:**

    - `template`: the source of the template.
    - `messages`: the conversation.
    - `written`: variables that count as written by the template, such as `bos_token`.
    - `variables`: variables that count as written by the user, such as `tools`.

    **Returns:**

    The text, with the author of each character.

    **Raises:** `ValueError` if a message or a variable is not like JSON, or the template rejects
    the conversation, fails or reaches a limit.
    """
    if len(template) > _MAX_SOURCE:
        raise ValueError(
            f"The chat template must have at most {_MAX_SOURCE:,} characters, but got "
            f"{len(template):,}. Use the template of the model's publisher."
        )
    environment = TemplateEnvironment()
    with limited():
        try:
            program = environment.parse(template)
            names = {node.value for node in program.find_all(nodes.Const)}
            roles = _ROLES | {n for n in names if isinstance(n, str) and _NAME.fullmatch(n)}
        except Exception as error:
            raise _failure(error) from error
        inputs: dict[str, object] = {
            "messages": [_message(message, i, roles) for i, message in enumerate(messages)]
        }
        inputs |= {name: given(value, f"`{name}`") for name, value in variables.items()}
        for name, value in written.items():
            inputs[name] = Text(value, TEMPLATE) if isinstance(value, str) else value
        try:
            return Statements(environment).run(program, inputs)
        except RefusedError:
            raise
        except Exception as error:  # Templates are programs and can raise anything.
            raise _failure(error) from error


def _failure(error: Exception) -> ValueError:
    if isinstance(error, TemplateLimitError):
        reason = f"{error}, the limit of a rendering"
    elif isinstance(error, RecursionError):
        reason = "it nests too deeply"
    elif isinstance(error, MemoryError):
        reason = "it needs too much memory"
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"The chat template failed: {reason}.")


def _message(message: Mapping[str, object], i: int, roles: frozenset[str]) -> object:
    """Copies a message as transformers shows it to templates."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{i}] must have a `role`, a string, but got {message!r}.")
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else []
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise ValueError(
            f"The `content` of messages[{i}] must be a string or a list of parts, but got "
            f"{content!r}. Convert it to a string."
        )
    for part in parts:
        if not isinstance(part, (str, Mapping)):
            raise ValueError(
                f"The parts of the `content` of messages[{i}] must be mappings such as "
                f'{{"type": "text", "text": ...}}, but got {part!r}.'
            )
    if content is None and message.keys() <= {"role", "content"}:
        raise ValueError(
            f"messages[{i}] must have a `content`, but got {message!r}. Only messages with other "
            "fields, such as `tool_calls`, can have none."
        )
    # Templates tell a missing field from an empty one, and would print None as a word.
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = [fields[name] for name in _REASONING if name in fields]
    if reasoning:
        fields = {"thinking": reasoning[0], **fields, "reasoning_content": reasoning[0]}
    copy = {
        Text.of(name): given(value, f"The field {name!r} of messages[{i}]")
        for name, value in fields.items()
    }
    role = str.__str__(fields["role"])
    copy[Text("role")] = Text(role, LABEL if role in roles else USER)
    return copy
