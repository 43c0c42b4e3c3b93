import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, all_leaves, tree_flatten_with_path
from jax.typing import DTypeLike
from jaxtyping import PyTree


RECURRENCE: Mapping[str, str] = MappingProxyType({"mamba_eqx": "recurrence"})
"""The metadata of fields that hold parameters of a recurrence (`A_log`, `D`, `dt_bias`).

```python
class MyMixer(mbx.AbstractSequenceLayer):
    A_log: Float[Array, "..."] = eqx.field(metadata=mbx.layers.RECURRENCE)
```

A recurrence compounds the rounding errors of such a parameter over the whole sequence. The
parameter therefore stays in float32 when the model is cast to a narrower dtype
([`mamba_eqx.cast`][]), and gets no weight decay in training ([`mamba_eqx.recurrence_mask`][]).
"""

FLOAT32: Mapping[str, str] = MappingProxyType({"mamba_eqx": "float32"})
"""The metadata of fields that hold other parameters that stay in float32 when the model is cast to
a narrower dtype ([`mamba_eqx.cast`][]).

Those of a [`mamba_eqx.layers.Router`][] are declared so: where two experts are close, a rounding
error decides between them. Unlike parameters of a recurrence, they get weight decay as usual.
"""


def recurrence_mask(tree: PyTree) -> PyTree[bool]:
    """Marks the leaves of a model that are parameters of a recurrence (`A_log`, `D`, `dt_bias`).

    These parameters stay in float32 in a bfloat16 model, and get no weight decay. (The official
    Mamba-1 code exempts only `A_log` and `D` from decay; the Mamba-2 code exempts `dt_bias` too.)

    **Arguments:**

    - `tree`: a model, or any pytree of its structure, for instance its gradients. It may contain
        nodes of any registered type.

    **Returns:**

    The same tree with `True` in place of these leaves and `False` in place of all others.
    """
    return _mark(tree, (RECURRENCE,), marked=False)


def float32_mask(tree: PyTree) -> PyTree[bool]:
    """Marks the leaves of a model that stay in float32 in a bfloat16 model: the parameters of
    recurrences ([`mamba_eqx.layers.RECURRENCE`][]) and of routers ([`mamba_eqx.layers.FLOAT32`][]).

    **Arguments:**

    - `tree`: a model, or any pytree of its structure.

    **Returns:**

    The same tree with `True` in place of these leaves and `False` in place of all others.
    """
    return _mark(tree, (RECURRENCE, FLOAT32), marked=False)


def _mark(
    node: PyTree, declarations: tuple[Mapping[str, str], ...], *, marked: bool
) -> PyTree[bool]:
    """Replaces the leaves below `node`, one level after another.

    **Arguments:**

    - `node`: any node or leaf of a pytree.
    - `declarations`: the metadata of the fields whose leaves are marked.
    - `marked`: whether the field that holds `node` has such metadata.
    """
    if all_leaves([node]):
        return marked
    children, structure = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    fields = {f.name: f for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
    marks: list[PyTree[bool]] = []
    for (key,), child in children:
        field = fields.get(key.name) if isinstance(key, GetAttrKey) else None
        metadata = {}.items() if field is None else field.metadata.items()
        declared = any(metadata >= declaration.items() for declaration in declarations)
        marks.append(_mark(child, declarations, marked=marked or declared))
    return structure.unflatten(marks)


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point leaves of a model to `dtype`.

    **Arguments:**

    - `tree`: a model, or any pytree of its structure.
    - `dtype`: the dtype of the result. Parameters of recurrences and of routers (see
        [`mamba_eqx.layers.float32_mask`][]) stay in float32 if `dtype` is narrower than float32.

    **Returns:**

    The same tree with cast leaves. Other leaves are returned unchanged.
    """
    wide = jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)

    def cast_leaf(leaf: PyTree, stays_wide: bool) -> PyTree:
        if not eqx.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(wide if stays_wide else dtype)

    return jax.tree.map(cast_leaf, tree, float32_mask(tree))
