import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeAlias, TypeGuard

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import check_count
from ..layers import AbstractSequenceLayer, QuantizedLinear, Stacked
from ..models import LanguageModel, SequenceClassifier


@dataclasses.dataclass(frozen=True)
class Part:
    """A row of a [`mamba_eqx.inspection.Summary`][]: a part of a model, or a run of equal parts.

    - `path`: the path of the part, such as `layers.layers.0.mixer`; of a run, `layers.layers.0-11`.
    - `kind`: the class of the part.
    - `shapes`: the shapes of the arrays that the part holds itself, by their names.
    - `count`: the number of equal parts.
    - `parameters`: the number of parameters of all these parts. A weight of 4 bits is one
        parameter.
    - `bytes`: the size of the arrays of all these parts.
    - `state_bytes`: the size of the states of all these parts, for one sequence without what grows
        with its tokens. `None` if a part has no state, or is inside of a `Stacked`, which has it.
    """

    path: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    count: int
    parameters: int
    bytes: int
    state_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A summary of a model; `str` returns it as a table.

    - `parts`: the parts of the model, each after the one that contains it.
    - `parameters`: the number of parameters. A weight of 4 bits is one parameter.
    - `bytes`: the size of all arrays.
    - `state_bytes`, `state_bytes_per_token`: the size of the state of one sequence: the constant
        part, and the part that grows with each token. 0 for modules without a state.
    """

    parts: tuple[Part, ...]
    parameters: int
    bytes: int
    state_bytes: int
    state_bytes_per_token: int

    def __str__(self) -> str:
        head = ("part", "kind", "shapes", "parameters", "bytes", "state bytes")
        rows = [head, *map(_cells, self.parts)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                # Text is aligned on the left, numbers on the right.
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        grows = self.state_bytes_per_token
        more = f" and {grows:,} for each token" if grows else ""
        lines.append("")
        lines.append(f"{self.parameters:,} parameters in {self.bytes:,} bytes")
        lines.append(f"state of a sequence: {self.state_bytes:,} bytes{more}")
        return "\n".join(lines)


def summary(model: eqx.Module, *, depth: int = 4) -> Summary:
    """Summarises a model: its parts, their shapes, parameters and bytes, and the size of a state.

    ```python
    import jax.random as jr
    import mamba_eqx as mbx

    block = mbx.BlockConfig(mbx.Mamba1Config(16))
    model = mbx.LanguageModelConfig(256, layers=(block,) * 2).build(key=jr.key(0))
    print(mbx.summary(model))
    ```

    **Arguments:**

    - `model`: a language model, a layer, or any other Equinox module, whose arrays may be shapes
        (`equinox.filter_eval_shape`). Nothing is computed.
    - `depth`: the number of levels of parts to list. Parts further down count for those above.

    **Returns:**

    A [`mamba_eqx.inspection.Summary`][].

    **Raises:** `ValueError` if `depth` is not a positive integer.
    """
    check_count("depth", depth)
    constant, per_token = _state_sizes(model) if _has_state(model) else (0, 0)
    return Summary(
        parts=tuple(_parts("", model, 1, depth, stacked=False)),
        parameters=_parameters(model),
        bytes=_bytes(model),
        state_bytes=constant,
        state_bytes_per_token=per_token,
    )


def _parts(path: str, node: Any, count: int, depth: int, *, stacked: bool) -> Iterator[Part]:
    arrays = {name: value.shape for name, value in _children(node) if isinstance(value, _ARRAYS)}
    state = None
    if _has_state(node) and not stacked:
        state = count * _state_sizes(node)[0]
    parameters, size = count * _parameters(node), count * _bytes(node)
    yield Part(path, type(node).__name__, arrays, count, parameters, size, state)
    if depth == 1:
        return
    stacked = stacked or isinstance(node, Stacked)
    for name, value in _children(node):
        below = f"{path}.{name}" if path else name
        if isinstance(value, eqx.Module):
            yield from _parts(below, value, count, depth - 1, stacked=stacked)
        elif isinstance(value, tuple | list):
            for first, last, part in _runs(value):
                place = f"{below}.{first}" if first == last else f"{below}.{first}-{last}"
                times = count * (last - first + 1)
                yield from _parts(place, part, times, depth - 1, stacked=stacked)


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def _children(node: Any) -> list[tuple[str, Any]]:
    fields = [field for field in dataclasses.fields(node) if not field.metadata.get("static")]
    return [(field.name, getattr(node, field.name)) for field in fields]


def _runs(parts: tuple[Any, ...] | list[Any]) -> list[tuple[int, int, Any]]:
    """Returns the first and last index, and the first part, of each run of equal modules."""
    runs: list[tuple[int, int, Any]] = []
    for i, part in enumerate(parts):
        if not isinstance(part, eqx.Module):
            continue
        if runs and runs[-1][1] == i - 1 and _structure(runs[-1][2]) == _structure(part):
            runs[-1] = (runs[-1][0], i, runs[-1][2])
        else:
            runs.append((i, i, part))
    return runs


def _structure(node: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(eqx.filter(node, lambda x: isinstance(x, _ARRAYS)))
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


_Stateful: TypeAlias = AbstractSequenceLayer[Any] | LanguageModel | SequenceClassifier


def _has_state(node: Any) -> TypeGuard[_Stateful]:
    return isinstance(node, AbstractSequenceLayer | LanguageModel | SequenceClassifier)


def _state_sizes(node: _Stateful) -> tuple[int, int]:
    """Returns the bytes of the state of one sequence: the constant part, and those per token."""
    one, two = (
        _bytes(eqx.filter_eval_shape(lambda node, n=n: node.init_state(max_len=n), node))
        for n in (1, 2)
    )
    return 2 * one - two, two - one


def _parameters(node: PyTree) -> int:
    """Counts the parameters, without the scales and the packing of quantised weights."""
    is_quantized = lambda part: isinstance(part, QuantizedLinear)
    dequantized = lambda node: jax.tree.map(
        lambda part: part.dequantized() if is_quantized(part) else part, node, is_leaf=is_quantized
    )
    leaves = jax.tree.leaves(eqx.filter_eval_shape(dequantized, node))
    return sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, _ARRAYS))


def _bytes(tree: PyTree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, _ARRAYS)]
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _cells(part: Part) -> tuple[str, ...]:
    shapes = ", ".join(f"{name} {shape}" for name, shape in part.shapes.items())
    return (
        part.path or "(the model)",
        part.kind if part.count == 1 else f"{part.count} x {part.kind}",
        shapes,
        f"{part.parameters:,}",
        f"{part.bytes:,}",
        "" if part.state_bytes is None else f"{part.state_bytes:,}",
    )
