"""The format that a request asks for: JSON, a JSON schema, or a regular expression."""

from ..generation import Grammar
from ._errors import ApiError, invalid
from ._fields import Fields, check_text
from ._served import Served


def read_format(fields: Fields, served: Served) -> Grammar | None:
    """Reads `response_format` of OpenAI's API, or `structured_outputs` as vLLM has it.

    A `json_object` can have a schema as its `value`, which is how the client of huggingface_hub
    sends one.

    Lark grammars are not among them: llguidance does not bound what they cost.

    **Returns:**

    The grammar of the text, or `None` for free text.

    **Raises:** `ApiError` if the format is invalid or too complex, or llguidance is not installed.
    """
    asked = fields.group("response_format")
    asked.check_names(["type", "json_schema", "value"])
    extra = fields.group("structured_outputs")
    extra.check_names(["json", "regex"])
    kind = asked.value("type") if fields.has("response_format") else "text"
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(
            "`response_format.type` must be text, json_object or json_schema.", "response_format"
        )
    if (kind != "text") + len(extra.names()) > 1:
        raise invalid(
            "A text can have one format. Give `response_format`, or `json` or `regex` in "
            "`structured_outputs`.",
            "structured_outputs",
        )
    if asked.has("json_schema") != (kind == "json_schema"):
        raise invalid(
            "`response_format.json_schema` must come with the type json_schema.", "response_format"
        )
    if asked.has("value") and kind != "json_object":
        raise invalid(
            "`response_format.value` must come with the type json_object.", "response_format"
        )
    name = "structured_outputs" if extra.names() else "response_format"
    try:
        grammar = _grammar(asked, extra, kind, served)
        if grammar is not None:
            grammar.start().allowed()  # Fails if no token can begin a text.
    except ValueError as error:
        raise invalid(str(error), name) from None
    except ImportError as error:
        raise ApiError(501, f"This server has no formats. {error}", param=name) from None
    return grammar


def _grammar(asked: Fields, extra: Fields, kind: str, served: Served) -> Grammar | None:
    """Reads the grammar of a format, or returns `None` for any text."""
    if extra.has("regex"):
        return Grammar.from_regex(check_text("regex", extra.value("regex")), served.tokenizer)
    if extra.has("json"):
        return Grammar.from_json_schema(_schema(extra, "json"), served.tokenizer)
    if kind == "json_object":
        schema = _schema(asked, "value") if asked.has("value") else {"type": "object"}
        return Grammar.from_json_schema(schema, served.tokenizer)
    if kind == "json_schema":
        described = asked.group("json_schema")
        described.check_names(["name", "description", "schema", "strict"])
        described.flag("strict")  # Schemas are always followed.
        return Grammar.from_json_schema(_schema(described, "schema"), served.tokenizer)
    return None


def _schema(fields: Fields, name: str) -> dict[str, object] | bool:
    schema = fields.value(name)
    if not isinstance(schema, dict | bool):
        raise invalid(f"`{name}` must be a JSON schema, which is an object.", name)
    return schema
