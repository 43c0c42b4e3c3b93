"""The statements of templates."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from jinja2 import nodes
from jinja2.compiler import find_undeclared
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import missing

from ._environment import TemplateEnvironment
from ._expressions import Expressions, Scope
from ._limits import check_length, spend, spend_on_size
from ._values import Namespace, text_of
from ._written import Text


class _Break(Exception):
    """The statement `break`."""


class _Continue(Exception):
    """The statement `continue`."""


class Statements:
    """Runs templates."""

    def __init__(self, environment: TemplateEnvironment):
        self._environment = environment
        self._expressions = Expressions(environment)
        self._evaluate = self._expressions.evaluate
        self._printed = 0  # characters
        self._special: dict[int, set[str]] = {}  # the special variables that each macro uses
        self._kinds: dict[type[nodes.Node], Callable[..., None]] = {
            nodes.Assign: self._assign,
            nodes.AssignBlock: self._assign_block,
            nodes.Block: self._block,
            nodes.Break: self._break,
            nodes.CallBlock: self._call_block,
            nodes.Continue: self._continue,
            nodes.FilterBlock: self._filter_block,
            nodes.For: self._for,
            nodes.If: self._if,
            nodes.Macro: self._macro,
            nodes.Output: self._output,
            nodes.Scope: self._scope,
            nodes.ScopedEvalContextModifier: self._autoescape,
            nodes.With: self._with,
        }

    def run(self, template: nodes.Template, variables: dict[str, object]) -> Text:
        """Returns the output of a template.

        **Arguments:**

        - `template`: the parsed template.
        - `variables`: its variables.
        """
        scope = Scope()
        scope.variables = self._environment.globals | variables
        blocks = Namespace({})
        for node in template.find_all(nodes.Block):
            blocks.attributes[node.name] = partial(self._block_text, node, scope)
        scope.variables["self"] = blocks
        return self._text(template.body, scope)

    def _text(self, body: list[nodes.Node], scope: Scope) -> Text:
        pieces: list[str] = []
        self._execute(body, scope, pieces)
        return Text("").join(pieces)

    def _execute(self, body: list[nodes.Node], scope: Scope, pieces: list[str]) -> None:
        for node in body:
            spend(1)
            execute = self._kinds.get(type(node))
            if execute is None:
                raise TypeError(f"it contains {type(node).__name__!r}, which needs other files")
            execute(node, scope, pieces)

    def _print(self, text: Text, pieces: list[str]) -> None:
        self._printed += len(text)
        check_length(self._printed)
        pieces.append(text)

    def _output(self, node: nodes.Output, scope: Scope, pieces: list[str]) -> None:
        for child in node.nodes:
            self._print(self._expressions.printed(child, scope), pieces)

    def _if(self, node: nodes.If, scope: Scope, pieces: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self._evaluate(branch.test, scope):
                self._execute(branch.body, scope, pieces)
                return
        self._execute(node.else_, scope, pieces)

    def _assign(self, node: nodes.Assign, scope: Scope, pieces: list[str]) -> None:
        self._store(node.target, self._evaluate(node.node, scope), scope)

    def _assign_block(self, node: nodes.AssignBlock, scope: Scope, pieces: list[str]) -> None:
        value: object = self._text(node.body, Scope(scope))
        if node.filter is not None:
            value = self._expressions.filtered_block(node.filter, text_of(value), scope)
        self._store(node.target, value, scope)

    def _store(self, target: nodes.Node, value: object, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.variables[target.name] = value
        elif isinstance(target, nodes.NSRef):
            namespace = scope.find(target.name)
            if not isinstance(namespace, Namespace):
                raise TypeError("cannot assign attribute on non-namespace object")
            namespace.assign(target.attr, value)
        elif isinstance(target, nodes.Tuple):
            spend_on_size(value)
            values = list(value)  # pyright: ignore[reportArgumentType]
            if len(values) != len(target.items):
                raise ValueError(f"{len(values)} values for {len(target.items)} variables")
            for item, part in zip(target.items, values, strict=True):
                self._store(item, part, scope)
        else:
            raise TypeError(f"cannot assign to {type(target).__name__}")

    def _for(self, node: nodes.For, scope: Scope, pieces: list[str]) -> None:
        items = self._evaluate(node.iter, scope)
        if node.recursive:
            self._print(self._loop_text(node, scope, items, 0), pieces)
        else:
            self._loop(
                node, scope, LoopContext(self._selected(node, scope, items), Undefined), pieces
            )

    def _loop_text(self, node: nodes.For, scope: Scope, items: object, depth: int) -> Text:
        def recurse(reciter: object, loop_render_func: object, depth: int = 0) -> Text:
            return self._loop_text(node, scope, reciter, depth)

        pieces: list[str] = []
        selected = self._selected(node, scope, items)
        self._loop(node, scope, LoopContext(selected, Undefined, recurse, depth), pieces)
        return Text("").join(pieces)

    def _selected(self, node: nodes.For, scope: Scope, items: object) -> Iterable[object]:
        if isinstance(items, str):
            items = Text.of(items)
        if node.test is None:
            return items  # pyright: ignore[reportReturnType]
        return self._tested(node, node.test, scope, items)  # pyright: ignore[reportArgumentType]

    def _tested(
        self, node: nodes.For, test: nodes.Node, scope: Scope, items: Iterable[object]
    ) -> Iterator[object]:
        for item in items:
            inner = Scope(scope)
            self._store(node.target, item, inner)
            if self._evaluate(test, inner):
                yield item

    def _loop(self, node: nodes.For, scope: Scope, loop: LoopContext, pieces: list[str]) -> None:
        runs = False
        for item, _ in loop:
            runs = True
            spend(1)
            inner = Scope(scope)
            inner.variables["loop"] = loop
            self._store(node.target, item, inner)
            try:
                self._execute(node.body, inner, pieces)
            except _Continue:
                continue
            except _Break:
                break
        if not runs:
            self._execute(node.else_, Scope(scope), pieces)

    def _break(self, node: nodes.Break, scope: Scope, pieces: list[str]) -> None:
        raise _Break("`break` must stand in a loop")

    def _continue(self, node: nodes.Continue, scope: Scope, pieces: list[str]) -> None:
        raise _Continue("`continue` must stand in a loop")

    def _macro(self, node: nodes.Macro, scope: Scope, pieces: list[str]) -> None:
        scope.variables[node.name] = self._defined(node, node.name, scope)

    def _defined(self, node: nodes.Macro | nodes.CallBlock, name: str, scope: Scope) -> Macro:
        names = tuple(argument.name for argument in node.args)
        extra = ("caller", "kwargs", "varargs")  # in the order in which jinja passes them
        if id(node) not in self._special:
            self._special[id(node)] = find_undeclared(node.body, extra)
        used = [name for name in extra if name in self._special[id(node)] - set(names)]

        def run(*values: object) -> Text:
            inner = Scope(scope)
            for i, (name, value) in enumerate(zip([*names, *used], values, strict=True)):
                if value is missing:
                    default = i - len(names)
                    if -default <= len(node.defaults):
                        value = self._evaluate(node.defaults[default], inner)
                    else:
                        value = Undefined(f"parameter {name!r} was not provided", name=name)
                inner.variables[name] = value
            return self._text(node.body, inner)

        kwargs, varargs, caller = ("kwargs" in used, "varargs" in used, "caller" in used)
        # Templates can print the names, as a tuple.
        arguments: Any = names
        return Macro(self._environment, run, name, arguments, kwargs, varargs, caller)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, pieces: list[str]) -> None:
        caller = self._defined(node, "caller", scope)
        self._print(text_of(self._expressions.call(node.call, scope, caller)), pieces)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, pieces: list[str]) -> None:
        inner = Scope(scope)
        text = self._text(node.body, inner)
        filtered = self._expressions.filtered_block(node.filter, text, inner)
        self._print(text_of(filtered), pieces)

    def _with(self, node: nodes.With, scope: Scope, pieces: list[str]) -> None:
        inner = Scope(scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self._store(target, self._evaluate(value, scope), inner)
        self._execute(node.body, inner, pieces)

    def _scope(self, node: nodes.Scope, scope: Scope, pieces: list[str]) -> None:
        self._execute(node.body, Scope(scope), pieces)

    def _block(self, node: nodes.Block, scope: Scope, pieces: list[str]) -> None:
        self._execute(node.body, Scope(scope if node.scoped else scope.outermost()), pieces)

    def _block_text(self, node: nodes.Block, scope: Scope) -> Text:
        return self._text(node.body, Scope(scope))

    def _autoescape(
        self, node: nodes.ScopedEvalContextModifier, scope: Scope, pieces: list[str]
    ) -> None:
        for option in node.options:
            if self._evaluate(option.value, scope):
                raise ValueError("it turns on autoescape, which is for web pages")
        self._execute(node.body, scope, pieces)
