"""The parameters of recurrences are found in any pytree that holds a model."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import training


class Pair(NamedTuple):
    actor: Any
    critic: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    actor: Any
    critic: Any
    log_rate: Any = dataclasses.field(default=None, metadata=mbx.layers.RECURRENCE)


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    """A node whose children have no names."""

    def __init__(self, actor: Any, critic: Any):
        self.children = (actor, critic)

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> "WithoutKeys":
        return cls(*children)


class Holder(eqx.Module):
    inner: Any


ACTOR = mbx.Mamba1(4, d_state=2, key=jr.key(0))
CRITIC = mbx.Block(mbx.Mamba2(4, headdim=4, d_state=2, key=jr.key(1)))
PYTREES: dict[str, Any] = {
    "list": [ACTOR, CRITIC],
    "NamedTuple": Pair(ACTOR, CRITIC),
    "registered dataclass": Registered(ACTOR, CRITIC),
    "node without keys": WithoutKeys(ACTOR, CRITIC),
    "nested": Holder([None, Pair(WithoutKeys(ACTOR, {}), Registered(CRITIC, ()))]),
}


@pytest.mark.parametrize("name", PYTREES)
def test_recurrences_are_found_below_any_node(name: str):
    """Masks and casts treat each leaf as they do in a tuple of the same models."""
    plain = (ACTOR, CRITIC)
    for function in (mbx.recurrence_mask, training.decay_mask, dtypes_after_cast):
        got = function(PYTREES[name])
        assert jax.tree.structure(got) == jax.tree.structure(PYTREES[name])
        assert jax.tree.leaves(got) == jax.tree.leaves(function(plain))


def dtypes_after_cast(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, mbx.cast(tree, jnp.bfloat16))


def test_any_dataclass_may_declare_a_recurrence():
    tree = Registered(jnp.ones(2), np.ones(2), log_rate=Pair(jnp.ones(2), jnp.ones(2)))
    assert jax.tree.leaves(mbx.recurrence_mask(tree)) == [False, False, True, True]
