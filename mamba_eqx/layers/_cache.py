import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


class AbstractCache(eqx.Module):
    """A state, or a part of one, that has room for a number of tokens and then is full.

    Without such a state a layer runs for ever; with one, whoever knows how many tokens are to come
    reserves room for them, as [`mamba_eqx.generate`][] does.
    """

    @abc.abstractmethod
    def with_room(self, max_len: int) -> "AbstractCache":
        """The same cache with room for at least `max_len` tokens, the ones in it included. It may
        be that of a batch, or of a [`mamba_eqx.Stacked`][]."""


def with_room(state: PyTree, max_len: int) -> PyTree:
    """A state of any layer, with room for at least `max_len` tokens in all its caches."""

    def is_cache(node: Any) -> bool:
        return isinstance(node, AbstractCache)

    def enlarged(node: Any) -> Any:
        return node.with_room(max_len) if isinstance(node, AbstractCache) else node

    return jax.tree.map(enlarged, state, is_leaf=is_cache)
