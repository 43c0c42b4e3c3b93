"""The jinja environment: the filters, tests and globals of templates."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import GeneratorType
from typing import Any, NamedTuple

from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext, Scope
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, generate_lorem_ipsum

from ._attributes import Format, Method, attribute_of, item_of
from ._filters import FILTERS
from ._limits import CHARACTERS_PER_STEP, check_length, spend, spend_on_all, spend_on_size
from ._values import Namespace, text_of
from ._written import Text


# What these filters and tests do takes time in proportion to everything inside their arguments;
# others visit at most the items.
_DEEP = frozenset(
    {"dictsort", "filter", "groupby", "max", "min", "pprint", "sort", "sum", "test", "unique"}
    | {"urlencode", "xmlattr", "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "gt"}
    | {"greaterthan", "in", "le", "lessthan", "lt", "ne"}
)
_SQUARED = frozenset({"striptags", "urlize", "wordwrap"})  # in the length of a text, at worst
# These convert their value to a text, which has to know its limits.
_OF_TEXT = frozenset({"lower", "upper", "wordcount"} | _SQUARED)
_CONSTANT = frozenset(
    {"boolean", "count", "d", "default", "defined", "length", "mapping", "none", "number", "string"}
)
_MAX_REASON = 1_000  # characters


class RefusedError(ValueError):
    """The template has called `raise_exception`."""


class Maker(NamedTuple):
    """A global function that takes any named arguments."""

    make: Callable[[Sequence[object], Mapping[str, object]], object]


class _Generation(Extension):
    """The tag `generation`, which marks what a model has written, for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """An environment that parses templates as transformers does, and whose filters see values
    through the attributes that are safe."""

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters = FILTERS
        self.tests["callable"] = _is_callable
        self.globals = {
            "range": self.globals["range"],
            "dict": Maker(_make_dict),
            "namespace": Maker(_make_namespace),
            "cycler": Cycler,
            "joiner": Joiner,
            "lipsum": _lipsum,
            "raise_exception": _refuse,
            "strftime_now": _strftime_now,
        }

    def getattr(self, obj: object, attribute: str) -> object:
        """Looks up `obj.attribute`."""
        spend(1)
        return attribute_of(obj, attribute)

    def getitem(self, obj: object, argument: object) -> object:
        """Looks up `obj[argument]`."""
        spend(1)
        return item_of(obj, argument)

    def call_filter(
        self,
        name: object,
        value: object,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        context: Context | None = None,
        eval_ctx: EvalContext | None = None,
    ) -> object:
        """Applies a filter."""
        name, value = _prepared(name, value, args, kwargs)
        result = super().call_filter(name, value, args, kwargs, context, eval_ctx)
        if isinstance(result, (GeneratorType, reversed)):
            # Generators around generators would overflow the stack when they are freed.
            items = list(result)
            spend(len(items))
            return iter(items)
        return Text.of(result) if isinstance(result, str) else result

    def call_test(
        self,
        name: object,
        value: object,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        context: Context | None = None,
        eval_ctx: EvalContext | None = None,
    ) -> bool:
        """Applies a test."""
        name, value = _prepared(name, value, args, kwargs)
        return super().call_test(name, value, args, kwargs, context, eval_ctx)


def _prepared(
    name: object,
    value: object,
    arguments: Sequence[object] | None,
    named: Mapping[str, object] | None,
) -> tuple[str, object]:
    """Counts the steps of a filter or a test, and returns its name and the value to apply it to."""
    spend(1)
    if not isinstance(name, str):
        raise TypeError("the name of a filter or a test must be a text")
    if name in _CONSTANT:
        return name, value
    if name in _OF_TEXT:
        value = text_of(value)
    if name in _SQUARED and isinstance(value, str):
        spend(len(value) ** 2 // CHARACTERS_PER_STEP)
    visit = spend_on_all if name in _DEEP else spend_on_size
    for argument in (value, *(arguments or ()), *(named or {}).values()):
        visit(argument)
    return name, value


def _is_callable(value: object) -> bool:
    return callable(value) or isinstance(value, (Method, Format, Maker))


def _make_dict(arguments: Sequence[object], named: Mapping[str, object]) -> dict[Any, Any]:
    spend_on_all(arguments)
    return dict(*arguments, **named)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _make_namespace(arguments: Sequence[object], named: Mapping[str, object]) -> Namespace:
    return Namespace(_make_dict(arguments, named))  # pyright: ignore[reportArgumentType]


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> Text:
    check_length(16 * n * max)
    spend(n * max)
    return Text.of(generate_lorem_ipsum(n, html, min, max))


def _refuse(message: object) -> None:
    reason = str.__str__(text_of(message))[:_MAX_REASON]
    raise RefusedError(f"The chat template rejects the conversation: {reason}")


def _strftime_now(format: str) -> Text:
    check_length(256 * len(format))
    return Text(datetime.now().strftime(str.__str__(format)), Text.of(format).author())
