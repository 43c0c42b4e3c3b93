from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


RECURRENCE: Mapping[str, str] = MappingProxyType({"mamba_eqx": "recurrence"})
"""The metadata of a field that holds a parameter of the recurrence itself: `A_log`, `D`, `dt_bias`.

```python
class MyMixer(mbx.AbstractSequenceLayer):
    A_log: Float[Array, "..."] = eqx.field(metadata=mbx.layers.RECURRENCE)
```

Such a parameter is compounded over the whole sequence. It therefore stays in float32 when the
model is cast below that ([`mamba_eqx.cast`][]), and is not decayed in training
([`mamba_eqx.recurrence_mask`][]).
"""


def recurrence_mask(tree: PyTree) -> PyTree[bool]:
    """Which leaves of a model are parameters of a recurrence (`A_log`, `D`, `dt_bias`).

    They stay in float32 in a bfloat16 model, and get no weight decay. (The official Mamba-1 code
    exempts only `A_log` and `D` from decay, that of Mamba-2 `dt_bias` as well.)

    **Returns:**

    The same tree with `True` in place of those leaves and `False` in place of all others.
    """

    def is_recurrence(path: tuple[Any, ...], _: Any) -> bool:
        node: Any = tree
        found = False
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                node = node[key.key]
            elif isinstance(key, jax.tree_util.SequenceKey):
                node = node[key.idx]
            elif isinstance(key, jax.tree_util.GetAttrKey) and isinstance(node, eqx.Module):
                metadata = type(node).__dataclass_fields__[key.name].metadata
                found = found or metadata.items() >= RECURRENCE.items()
                node = getattr(node, key.name)
            else:
                # Inside some other node: it can hold no field of ours that its own class declares.
                break
        return found

    return jax.tree_util.tree_map_with_path(is_recurrence, tree)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts the floating-point leaves of a model (or of anything of its structure) to `dtype`.

    The parameters of recurrences (see [`mamba_eqx.recurrence_mask`][]) stay in float32 if `dtype`
    is narrower than that.
    """
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

    def cast_leaf(leaf: Any, recurrence: bool) -> Any:
        if not eqx.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(wide if recurrence else dtype)

    return jax.tree.map(cast_leaf, tree, recurrence_mask(tree))
