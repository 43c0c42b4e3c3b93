"""Training over rows that are sharded over eight devices."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import mamba_eqx as mbx
from mamba_eqx import training
from mamba_eqx.training._row_sharding import Shardings
from tests.support.collectives import collectives
from tests.support.devices import ROWS, VOCAB, batch, train


pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.skipif(len(jax.devices()) < 8, reason="test_on_eight_devices runs this"),
]
MIXERS = {
    "mamba1": mbx.Mamba1Config(8, d_state=4),
    "mamba2": mbx.Mamba2Config(8, d_state=4, headdim=4),
    "mamba3": mbx.Mamba3Config(8, d_state=4, headdim=4),
    "attention": mbx.AttentionConfig(8, nheads=2),
}


def model(mixer: str, *, tie: bool = False, stacked: bool = False) -> Any:
    config = mbx.LanguageModelConfig(VOCAB, (mbx.BlockConfig(MIXERS[mixer]),), tie_embeddings=tie)
    return config.build(stacked=stacked, key=jr.key(0))


def arrays_put(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, sharding) if eqx.is_array(a) else a, tree)


def program(step: Any, state: Any, rows: Any) -> str:
    return step._run.lower(rows, state, Shardings.of(rows, state)).compile().compiled.as_text()


@pytest.mark.parametrize(("axes", "accumulate"), [(AxisType.Auto, 2), (AxisType.Explicit, 1)])
def test_step_over_sharded_rows_is_that_of_one_device(axes, accumulate):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    options: Any = {"accumulate": accumulate, "average_decay": 0.9}
    step = training.TrainStep(optax.sgd(0.1), **options)
    want = train(step, step.init(model("mamba2"), rows=ROWS, key=jr.key(0)), batch())
    explicit = axes is AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        state = step.init(model("mamba2"), rows=ROWS, key=jr.key(0))
        carry = arrays_put(state.carry, NamedSharding(mesh, P("data")))
        state = eqx.tree_at(
            lambda state: state.carry, arrays_put(state, NamedSharding(mesh, P())), carry
        )
        got = train(step, state, arrays_put(batch(), NamedSharding(mesh, P("data"))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_only_gradients_are_exchanged(mixer):
    """A step's collectives are sums, of as many bytes as the gradient has, and none is in a loop.

    The gradient of a tied embedding is summed twice: as embedding and as head.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = training.TrainStep(optax.sgd(0.1))
    tie = mixer == "mamba2"
    made = model(mixer, tie=tie)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(made, eqx.is_array)))
    state = arrays_put(step.init(made, key=jr.key(0)), NamedSharding(mesh, P()))
    rows = arrays_put(batch(), NamedSharding(mesh, P("data")))
    found = collectives(program(step, state, rows))
    assert {(each.kind, each.loops) for each in found} == {("all-reduce", 0)}
    scalars = sum(each.bytes for each in found) - size - tie * made.embedding.weight.nbytes
    assert 0 <= scalars <= 16


def test_state_keeps_its_shardings():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = training.TrainStep(optax.sgd(0.1), average_decay=0.9)

    def place(leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        axes = [i for i, n in enumerate(leaf.shape) if n % 8 == 0]
        spec = [None] * leaf.ndim
        if axes and leaf.ndim > 1:
            spec[axes[-1]] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    state = jax.tree.map(place, step.init(model("mamba2", stacked=True), key=jr.key(0)))
    before = [leaf.sharding for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))]
    rows = arrays_put(batch(), NamedSharding(mesh, P("data")))
    for _ in range(2):
        state, _ = step(state, rows)
    after = jax.tree.leaves(eqx.filter(state, eqx.is_array))
    for leaf, sharding in zip(after, before, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
