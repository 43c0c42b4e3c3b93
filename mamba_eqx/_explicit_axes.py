"""Helpers for meshes with explicit axes, in which the type of an array tells how it is sharded."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree


def has_explicit_axes(array: Array) -> bool:
    """Returns whether an array lies in a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def with_derived_shardings(function: Callable[..., Array], x: Array, *others: PyTree) -> Array:
    """Calls a function for which XLA derives the shardings, in place of JAX.

    JAX has no rule for some operations in a mesh with explicit axes. The result is sharded over its
    first axis as `x` is, and over no other axis.

    **Arguments:**

    - `function`: a function of the other arguments to an array.
    - `x`, `others`: the arguments of the function.

    **Returns:**

    The result of the function.
    """
    if not has_explicit_axes(x):
        return function(x, *others)
    sharding = jax.typeof(x).sharding
    out = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
    derived: Callable[..., Array] = jax.sharding.auto_axes(out_sharding=out)(function)
    return derived(x, *others)
