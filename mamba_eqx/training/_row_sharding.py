"""How the rows of a batch are sharded over devices, which code inside `jax.jit` cannot see."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, Sharding
from jaxtyping import Array, PyTree

from .._explicit_axes import has_explicit_axes


State = TypeVar("State")
_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


def row_sharding(batch: PyTree) -> NamedSharding | None:
    """Returns how the rows of a batch are sharded; `None` if one device holds them, or if the
    arrays of the batch differ."""
    found: set[NamedSharding | None] = set()
    for leaf in jax.tree.leaves(batch):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            return None
        found.add(NamedSharding(sharding.mesh, P(*sharding.spec[:1])))
    return found.pop() if len(found) == 1 else None


class Shardings(NamedTuple):
    """How the arrays of a training step are distributed over several devices; static."""

    rows: NamedSharding | None
    """How the rows of the batch are sharded; `None` if that is unknown."""

    state: tuple[Sharding | None, ...]
    """The shardings of the leaves of the state; `None` for those on one device."""

    @classmethod
    def of(cls, batch: PyTree, state: PyTree) -> "Shardings | None":
        """Reads the shardings of arrays; `None` if all are on one device."""
        found = tuple(map(_over_devices, jax.tree.leaves(state)))
        rows = row_sharding(batch)
        return None if rows is None and not any(found) else cls(rows, found)

    def constrain(self, state: State) -> State:
        """Returns the state with each leaf in the sharding that it had."""
        leaves, structure = jax.tree.flatten(state)
        pairs = zip(leaves, self.state, strict=True)
        put = jax.lax.with_sharding_constraint
        return structure.unflatten(
            [leaf if sharding is None else put(leaf, sharding) for leaf, sharding in pairs]
        )


def _over_devices(leaf: PyTree) -> Sharding | None:
    """Returns the sharding of an array on several devices whose axes XLA divides."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


@contextlib.contextmanager
def rows_sharded(sharding: NamedSharding | None) -> Iterator[None]:
    """Tells the losses traced in this context how the rows are sharded."""
    token = _rows.set(sharding)
    try:
        yield
    finally:
        _rows.reset(token)


def total_over_rows(
    total: Callable[[PyTree, PyTree], Array], parameters: PyTree, rows: PyTree
) -> Array:
    """Returns `total(parameters, rows)`, a sum over the rows, of which each device adds its own.

    XLA alone would sum over the devices in every pass of a loop inside `total`, and so would its
    derivative: the whole gradient of a head, once for each piece.

    **Arguments:**

    - `total`: a function of the parameters and the rows to a sum over the rows.
    - `parameters`: a pytree of arrays that are the same for all rows.
    - `rows`: a pytree of arrays whose first axis is the rows.

    **Returns:**

    The sum over all rows.
    """
    first = jax.tree.leaves(rows)[0]
    sharding: Any = jax.typeof(first).sharding if has_explicit_axes(first) else _rows.get()
    entry = None if sharding is None or not sharding.spec else sharding.spec[0]
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if sharding is None or not axes:
        return total(parameters, rows)
    devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if devices == 1 or first.shape[0] % devices:
        return total(parameters, rows)
    return jax.shard_map(
        lambda parameters, rows: lax.psum(total(parameters, rows), axes),
        mesh=sharding.mesh,
        in_specs=(P(), P(axes)),
        out_specs=P(),
        axis_names=set(axes),
    )(parameters, rows)
