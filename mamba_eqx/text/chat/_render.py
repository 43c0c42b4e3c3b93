"""Rendering of a conversation."""

import re
import reprlib
from collections.abc import Mapping, Sequence

from jinja2 import nodes

from ._environment import RefusedError, TemplateEnvironment
from ._limits import limited
from ._statements import Statements
from ._values import InputError, given
from ._written import LABEL, TEMPLATE, USER, Text


_MAX_SOURCE = 200_000  # characters
_MAX_REASON = 1_000
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_ROLES = frozenset({"assistant", "developer", "function", "model", "system", "tool", "user"})
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
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            f"`messages` must be a list of messages, but got {reprlib.repr(messages)}."
        )
    environment = TemplateEnvironment()
    with limited(len(messages)):
        try:
            program = environment.parse(template)
            names = {node.value for node in program.find_all(nodes.Const)}
            roles = _ROLES | {n for n in names if isinstance(n, str) and _NAME.fullmatch(n)}
            inputs: dict[str, object] = {
                "messages": [_message(message, i, roles) for i, message in enumerate(messages)]
            }
            inputs |= {name: given(value, f"`{name}`") for name, value in variables.items()}
            for name, value in written.items():
                inputs[name] = Text(value, TEMPLATE) if isinstance(value, str) else value
            return Statements(environment).run(program, inputs)
        except (InputError, RefusedError):
            raise
        except RecursionError as error:
            reason, cause = "it nests too deeply", error
        except MemoryError as error:
            reason, cause = "it needs too much memory", error
        except Exception as error:  # Templates are programs and can raise anything.
            reason, cause = str(error) or type(error).__name__, error
    raise ValueError(f"The chat template failed: {reason[:_MAX_REASON]}.") from cause


def _message(message: Mapping[str, object], i: int, roles: frozenset[str]) -> object:
    """Copies a message as transformers shows it to templates."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            f"messages[{i}] must have a `role`, a string, but got {reprlib.repr(message)}."
        )
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else []
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise InputError(
            f"The `content` of messages[{i}] must be a string or a list of parts, but got "
            f"{reprlib.repr(content)}. Convert it to a string."
        )
    for part in parts:
        if not isinstance(part, (str, Mapping)):
            raise InputError(
                f"The parts of the `content` of messages[{i}] must be mappings such as "
                f'{{"type": "text", "text": ...}}, but got {reprlib.repr(part)}.'
            )
    if content is None and message.keys() <= {"role", "content"}:
        raise InputError(
            f"messages[{i}] must have a `content`, but got {reprlib.repr(message)}. Only "
            "messages with other fields, such as `tool_calls`, can have none."
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
    role = str(fields["role"])
    copy[Text("role")] = Text(role, LABEL if role in roles else USER)
    return copy
