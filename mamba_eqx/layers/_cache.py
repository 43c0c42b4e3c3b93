import abc

import equinox as eqx
import jax
from jaxtyping import PyTree


class AbstractCache(eqx.Module):
    """A state, or a part of a state, with a fixed capacity in tokens.

    Layers without caches run forever. Callers that run layers with caches reserve capacity with
    [`mamba_eqx.layers.with_room`][] before the cache fills, as [`mamba_eqx.generate`][] does.
    """

    @abc.abstractmethod
    def with_room(self, max_len: int) -> "AbstractCache":
        """Returns the same cache with a capacity of at least `max_len` tokens.

        The leaves may have leading axes, of a batch or of a [`mamba_eqx.Stacked`][].

        **Arguments:**

        - `max_len`: the capacity in tokens, including the tokens already in the cache.
        """


def with_room(state: PyTree, max_len: int) -> PyTree:
    """Enlarges every cache in the state of any layer or model.

    **Arguments:**

    - `state`: the state, possibly batched.
    - `max_len`: the capacity in tokens, including the tokens already in the caches.

    **Returns:**

    The state with a capacity of at least `max_len` tokens in all its caches. Larger caches, and
    everything that is not a cache, stay as they are.
    """

    def is_cache(node: PyTree) -> bool:
        return isinstance(node, AbstractCache)

    def enlarge(node: PyTree) -> PyTree:
        return node.with_room(max_len) if isinstance(node, AbstractCache) else node

    return jax.tree.map(enlarge, state, is_leaf=is_cache)
