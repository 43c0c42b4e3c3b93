import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from ..layers import Linear, QuantizedLinear


ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_PARTS = (eqx.Module, *ARRAYS)


@runtime_checkable
class Config(Protocol):
    """A hashable config that builds a module."""

    def build(self, *, key: PRNGKeyArray) -> eqx.Module: ...


ConfigT = TypeVar("ConfigT", bound=Config)


def checked_config(config: ConfigT, module: eqx.Module, *, ignore: str | None = None) -> ConfigT:
    """Returns `config` after checking that `config` builds a module of the structure of `module`.

    The structure consists of types, static fields, and the shapes of arrays up to leading axes.

    **Arguments:**

    - `config`: the config that was read off `module`.
    - `module`: the module, from which arrays may be left out (`None`).
    - `ignore`: the name of a field of `module` that is not compared.

    **Raises:** `ValueError` that names the first difference.
    """
    built = _build_shapes(config)
    for path, got, want in _differences(module, built, ignore):
        name = type(module).__name__
        raise ValueError(
            f"{type(config).__name__} cannot express this {name}: its `{path}` is {got}, but "
            f"building the config gives {want}. Use a {name} that a config can build."
        )
    return config


@functools.lru_cache(maxsize=128)
def _build_shapes(config: Config) -> eqx.Module:
    # Tracing takes milliseconds, and the layers of a model are mostly alike.
    return eqx.filter_eval_shape(lambda: config.build(key=jr.key(0)))


def _differences(
    got: object, want: object, ignore: str | None = None, path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yields the path of each difference, and a description of both sides."""
    if isinstance(want, ARRAYS) and got is None:
        return
    if isinstance(got, QuantizedLinear) and isinstance(want, Linear):
        # How a weight is stored is not a part of the config.
        if got.weight is None:
            return (yield from _differences(got.bias, want.bias, path=f"{path}.bias"))
        got = eqx.filter_eval_shape(got.dequantized)
    if isinstance(want, ARRAYS) and isinstance(got, ARRAYS):
        # The models of an ensemble are stacked along leading axes, which a config does not have.
        if got.shape[max(0, len(got.shape) - len(want.shape)) :] != want.shape:
            yield path, _describe(got), _describe(want)
    elif isinstance(got, eqx.Module) and type(got) is type(want):
        for field in dataclasses.fields(got):
            if field.name != ignore:
                below = f"{path}.{field.name}" if path else field.name
                parts = (getattr(side, field.name) for side in (got, want))
                yield from _differences(*parts, path=below)
    elif isinstance(got, tuple) and isinstance(want, tuple) and len(got) == len(want):
        for i, parts in enumerate(zip(got, want, strict=True)):
            yield from _differences(*parts, path=f"{path}.{i}")
    elif isinstance(got, _PARTS) or isinstance(want, _PARTS) or got != want:
        yield path, _describe(got), _describe(want)


def _describe(value: object) -> str:
    if isinstance(value, ARRAYS):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" if isinstance(value, eqx.Module) else repr(value)
