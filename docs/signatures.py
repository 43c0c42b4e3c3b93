"""An extension of Griffe that completes the signatures of the API reference.

- An `equinox.Module` without `__init__` is a dataclass, so its fields are its signature. Griffe
  knows decorated dataclasses only.
- A name that users cannot import, such as the alias of a long type or a private constant, is
  replaced by its value.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import griffe


# The names that are replaced by their values.
_REPLACED = {
    "COMPUTED",
    "Cache",
    "Length",
    "Mask",
    "PerRow",
    "PerRowInt",
    "Prompt",
    "Prompts",
    "Remat",
    "Reset",
    "StateTuple",
    "TokenMap",
    "_EPS",
    "_Ids",
    "_ROTARY_EMB_BASE",
    "_Shardings",
}


class Signatures(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for item in list(_walk(pkg)):
            if isinstance(item, griffe.Class) and _is_plain_module(item):
                item.set_member("__init__", _initialiser(item))
        for item in _walk(pkg):
            if isinstance(item, griffe.Function):
                for parameter in item.parameters:
                    parameter.annotation = _replace(parameter.annotation, item)
                    parameter.default = _replace(parameter.default, item)
                item.returns = _replace(item.returns, item)
            elif isinstance(item, griffe.Attribute):
                item.annotation = _replace(item.annotation, item)
                item.value = _replace(item.value, item)  # Griffe makes defaults of it.


def _walk(item: griffe.Object) -> Iterator[griffe.Object]:
    for member in list(item.members.values()):
        if isinstance(member, griffe.Object):
            yield member
            yield from _walk(member)


def _is_plain_module(item: griffe.Class) -> bool:
    bases = {str(base) for base in item.bases}
    return bool(bases & {"eqx.Module", "Module"}) and "__init__" not in item.members


def _initialiser(item: griffe.Class) -> griffe.Function:
    positional = griffe.ParameterKind.positional_or_keyword
    parameters = griffe.Parameters(griffe.Parameter("self", kind=positional))
    for field in item.members.values():
        is_field = isinstance(field, griffe.Attribute) and field.annotation is not None
        if is_field and "property" not in field.labels:
            parameters.add(
                griffe.Parameter(
                    field.name,
                    annotation=field.annotation,
                    kind=positional,
                    default=_default(field.value),
                )
            )
    return griffe.Function("__init__", parent=item, parameters=parameters, returns="None")


def _default(value: Any) -> Any:
    """Returns the default of a field, without the call of `eqx.field`."""
    if isinstance(value, griffe.ExprCall):
        named = {
            arg.name: arg.value for arg in value.arguments if isinstance(arg, griffe.ExprKeyword)
        }
        return named.get("default")
    return value


def _replace(expression: Any, scope: griffe.Object) -> Any:
    if isinstance(expression, griffe.ExprName) and expression.name in _REPLACED:
        found = _find(expression, scope)
        # A class may have the name of an alias elsewhere.
        return _replace(found.value, scope) if isinstance(found, griffe.Attribute) else expression
    if isinstance(expression, griffe.Expr):
        changes = {
            field.name: _replace(value, scope)
            for field in dataclasses.fields(expression)
            if isinstance(value := getattr(expression, field.name), griffe.Expr | list)
        }
        return dataclasses.replace(expression, **changes) if changes else expression
    if isinstance(expression, list):
        return [_replace(part, scope) for part in expression]
    return expression


def _find(name: griffe.ExprName, scope: griffe.Object) -> Any:
    found = scope.modules_collection[name.canonical_path]
    return found.final_target if found.is_alias else found
