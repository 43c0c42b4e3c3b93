"""The expressions of templates."""

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import SandboxedFormatter

from ._attributes import Format, Method
from ._environment import Maker, TemplateEnvironment
from ._formatting import format_text
from ._limits import check_number, spend, spend_on_all, spend_on_size
from ._operators import binary, compare
from ._values import number_from, text_of
from ._written import TEMPLATE, Text


class Scope:
    """The variables of a part of a template, and those of the parts around it."""

    def __init__(self, outer: "Scope | None" = None):
        self.variables: dict[str, object] = {}
        self._outer = outer

    def find(self, name: str) -> object:
        """Returns the value of a variable."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope._outer
        return Undefined(name=name)

    def outermost(self) -> "Scope":
        """Returns the scope of the whole template."""
        scope = self
        while scope._outer is not None:
            scope = scope._outer
        return scope


class Expressions:
    """Evaluates expressions. This is an interpreter, rather than jinja's compiler, since every
    operation must keep the authors of texts and count its steps."""

    def __init__(self, environment: TemplateEnvironment):
        self._environment = environment
        self._context = Context(environment, {}, None, {})
        self._formatter = SandboxedFormatter(environment)
        self._kinds: dict[type[nodes.Node], Callable[..., object]] = {
            nodes.Add: self._binary,
            nodes.And: self._and,
            nodes.Call: self.call,
            nodes.Compare: self._compare,
            nodes.Concat: self._concat,
            nodes.CondExpr: self._condition,
            nodes.Const: self._const,
            nodes.Dict: self._dict,
            nodes.Div: self._binary,
            nodes.Filter: self._filter,
            nodes.FloorDiv: self._binary,
            nodes.Getattr: self._getattr,
            nodes.Getitem: self._getitem,
            nodes.List: self._list,
            nodes.Mod: self._binary,
            nodes.Mul: self._binary,
            nodes.Name: self._name,
            nodes.Neg: self._negative,
            nodes.Not: self._not,
            nodes.Or: self._or,
            nodes.Pos: self._positive,
            nodes.Pow: self._binary,
            nodes.Slice: self._slice,
            nodes.Sub: self._binary,
            nodes.TemplateData: self._data,
            nodes.Test: self._test,
            nodes.Tuple: self._tuple,
        }

    def evaluate(self, node: nodes.Node, scope: Scope) -> object:
        """Returns the value of an expression."""
        spend(1)
        evaluate = self._kinds.get(type(node))
        if evaluate is None:
            raise TypeError(f"it contains an unknown expression, {type(node).__name__}")
        return evaluate(node, scope)

    def printed(self, node: nodes.Node, scope: Scope) -> Text:
        """Returns what a template prints for an expression."""
        if isinstance(node, nodes.Const):
            return Text(str(node.value), TEMPLATE)
        return text_of(self.evaluate(node, scope))

    def filtered(self, node: nodes.Filter, value: object, scope: Scope) -> object:
        """Returns what a filter makes of a value."""
        arguments, named = self._arguments(node, scope)
        result = self._environment.call_filter(
            node.name, value, arguments, named, context=self._context
        )
        check_number(result)
        return result

    def filtered_block(self, node: nodes.Filter, text: Text, scope: Scope) -> object:
        """Returns what the filters of a block make of its text."""
        if isinstance(node.node, nodes.Filter):
            return self.filtered(node, self.filtered_block(node.node, text, scope), scope)
        return self.filtered(node, text, scope)

    def call(self, node: nodes.Call, scope: Scope, caller: Macro | None = None) -> object:
        """Returns the result of a call."""
        function = self.evaluate(node.node, scope)
        arguments, named = self._arguments(node, scope)
        if caller is not None:
            named["caller"] = caller
        if isinstance(function, Method):
            for argument in (function.value, *arguments):
                spend_on_size(argument)
            result = function.function(function.value, *arguments, **named)
        elif isinstance(function, Format):
            fields: Any = named
            if function.takes_mapping:
                (fields,) = arguments
                arguments = []
            result = format_text(self._formatter, function.text, arguments, fields)
        elif isinstance(function, Maker):
            result = function.make(arguments, named)
        elif callable(function):
            result = function(*arguments, **named)
        else:
            raise TypeError(f"{type(function).__name__!r} object is not callable")
        check_number(result)
        return Text.of(result) if isinstance(result, str) else result

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[object], dict[str, object]]:
        arguments = [self.evaluate(argument, scope) for argument in node.args]
        named: dict[str, object] = {
            str(pair.key): self.evaluate(pair.value, scope) for pair in node.kwargs
        }
        if node.dyn_args is not None:
            arguments += self.evaluate(node.dyn_args, scope)  # pyright: ignore
            spend(len(arguments))
        if node.dyn_kwargs is not None:
            more = self.evaluate(node.dyn_kwargs, scope)
            spend_on_size(more)
            named |= {str.__str__(key): value for key, value in more.items()}  # pyright: ignore
        return arguments, named

    def _name(self, node: nodes.Name, scope: Scope) -> object:
        return scope.find(node.name)

    def _const(self, node: nodes.Const, scope: Scope) -> object:
        return Text(node.value, TEMPLATE) if isinstance(node.value, str) else node.value

    def _data(self, node: nodes.TemplateData, scope: Scope) -> object:
        return Text(node.data, TEMPLATE)

    def _getattr(self, node: nodes.Getattr, scope: Scope) -> object:
        return self._environment.getattr(self.evaluate(node.node, scope), node.attr)

    def _getitem(self, node: nodes.Getitem, scope: Scope) -> object:
        value = self.evaluate(node.node, scope)
        item = self._environment.getitem(value, self.evaluate(node.arg, scope))
        if isinstance(node.arg, nodes.Slice) and isinstance(item, Undefined):
            raise TypeError(f"{type(value).__name__!r} object has no slices")
        return item

    def _slice(self, node: nodes.Slice, scope: Scope) -> object:
        ends = (node.start, node.stop, node.step)
        return slice(*(None if end is None else self.evaluate(end, scope) for end in ends))

    def _filter(self, node: nodes.Filter, scope: Scope) -> object:
        assert node.node is not None
        return self.filtered(node, self.evaluate(node.node, scope), scope)

    def _test(self, node: nodes.Test, scope: Scope) -> object:
        value = self.evaluate(node.node, scope)
        arguments, named = self._arguments(node, scope)
        return self._environment.call_test(
            node.name, value, arguments, named, context=self._context
        )

    def _list(self, node: nodes.List, scope: Scope) -> object:
        return [self.evaluate(item, scope) for item in node.items]

    def _tuple(self, node: nodes.Tuple, scope: Scope) -> object:
        return tuple(self.evaluate(item, scope) for item in node.items)

    def _dict(self, node: nodes.Dict, scope: Scope) -> object:
        made: dict[object, object] = {}
        for pair in node.items:
            key = self.evaluate(pair.key, scope)
            spend_on_all(key)
            made[key] = self.evaluate(pair.value, scope)
        return made

    def _concat(self, node: nodes.Concat, scope: Scope) -> object:
        return Text("").join([text_of(self.evaluate(part, scope)) for part in node.nodes])

    def _condition(self, node: nodes.CondExpr, scope: Scope) -> object:
        if self.evaluate(node.test, scope):
            return self.evaluate(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("the inline if-expression evaluated to false, and has no else part")
        return self.evaluate(node.expr2, scope)

    def _and(self, node: nodes.And, scope: Scope) -> object:
        return self.evaluate(node.left, scope) and self.evaluate(node.right, scope)

    def _or(self, node: nodes.Or, scope: Scope) -> object:
        return self.evaluate(node.left, scope) or self.evaluate(node.right, scope)

    def _not(self, node: nodes.Not, scope: Scope) -> object:
        return not self.evaluate(node.node, scope)

    def _negative(self, node: nodes.Neg, scope: Scope) -> object:
        value = self.evaluate(node.node, scope)
        return number_from(-value, value)  # pyright: ignore[reportOperatorIssue]

    def _positive(self, node: nodes.Pos, scope: Scope) -> object:
        value = self.evaluate(node.node, scope)
        return number_from(+value, value)  # pyright: ignore[reportOperatorIssue]

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> object:
        left, right = self.evaluate(node.left, scope), self.evaluate(node.right, scope)
        return binary(node.operator, left, right)

    def _compare(self, node: nodes.Compare, scope: Scope) -> object:
        left = self.evaluate(node.expr, scope)
        for operand in node.ops:
            right = self.evaluate(operand.expr, scope)
            if not compare(operand.op, left, right):
                return False
            left = right
        return True
