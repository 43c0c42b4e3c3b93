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
from tests.support.cases import scan, step


pytestmark = pytest.mark.usefixtures("compile_fast")


class Pair(NamedTuple):
    actor: Any
    critic: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    actor: Any
    critic: Any
    log_rate: Any = dataclasses.field(default=None, metadata=mbx.layers.RECURRENCE)
    choice: Any = dataclasses.field(default=None, metadata=mbx.layers.FLOAT32)


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
    for function in (
        mbx.recurrence_mask,
        mbx.layers.float32_mask,
        training.decay_mask,
        dtypes_after_cast,
    ):
        got = function(PYTREES[name])
        assert jax.tree.structure(got) == jax.tree.structure(PYTREES[name])
        assert jax.tree.leaves(got) == jax.tree.leaves(function(plain))


def dtypes_after_cast(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, mbx.cast(tree, jnp.bfloat16))


MIXERS = {
    "Mamba1": mbx.Mamba1(4, d_state=2, conv_bias=False, key=jr.key(0)),
    "Mamba2": mbx.Mamba2(4, d_state=2, headdim=1, conv_bias=False, key=jr.key(0)),
    "Mamba3": mbx.Mamba3(4, d_state=4, headdim=1, key=jr.key(0)),
}


@pytest.mark.parametrize(
    "name", ["Mamba1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Mamba2", "Mamba3"))]
)
def test_step_sizes_of_bfloat16_mixers_are_float32(name: str):
    """With projections of zero, a mixer decays its state by `exp(-softplus(dt_bias))`, to the
    precision of float32. (In bfloat16, the step sizes would have three digits.)"""
    mixer = eqx.tree_at(lambda m: m.in_proj.weight, MIXERS[name], replace_fn=jnp.zeros_like)
    if not isinstance(mixer, mbx.Mamba3):  # The rate of Mamba-3 is 1 for a projection of zero.
        mixer = eqx.tree_at(lambda m: m.A_log, mixer, replace_fn=jnp.zeros_like)
    mixer: Any = mbx.cast(mixer, jnp.bfloat16)
    start = mixer.init_state()
    start = eqx.tree_at(lambda state: state.ssm, start, replace_fn=jnp.ones_like)
    shape = (-1, 1, 1) if name == "Mamba3" else (-1,) if name == "Mamba1" else (-1, 1)
    kept = np.exp(-np.logaddexp(0, np.asarray(mixer.dt_bias, np.float64))).reshape(shape)
    x = jnp.ones((1, 4), jnp.bfloat16)
    for _, after in (scan(mixer, x, start), step(mixer, x[0], start)):
        want = np.broadcast_to(kept, after.ssm.shape)
        np.testing.assert_allclose(after.ssm, want, rtol=1e-6)


def test_any_dataclass_may_declare_its_parameters():
    matrix = jnp.ones((2, 2))
    tree = Registered(matrix, matrix, log_rate=Pair(matrix, matrix), choice=matrix)
    assert jax.tree.leaves(mbx.recurrence_mask(tree)) == [False, False, True, True, False]
    assert jax.tree.leaves(mbx.layers.float32_mask(tree)) == [False, False, True, True, True]
    assert jax.tree.leaves(dtypes_after_cast(tree)) == ["bfloat16"] * 2 + ["float32"] * 3
    assert jax.tree.leaves(training.decay_mask(tree)) == [True, True, False, False, True]
