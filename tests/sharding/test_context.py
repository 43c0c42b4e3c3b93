"""Sequences whose pieces lie on eight devices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

import mamba_eqx as mbx
from tests.support.cases import assert_close, quick
from tests.support.collectives import collectives
from tests.support.devices import mesh, waves
from tests.support.registry import SIZES, make_inputs, make_layer


pytestmark = pytest.mark.usefixtures("compile_fast")
eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="test_on_eight_devices runs this")
SEQ = 40
# On four devices of ten tokens: resets on a border, before one and within a piece; lengths within a
# piece, on a border, and of no token.
CASES = [([], SEQ), ([10, 29], SEQ), ([0, 9], 33), ([7], 0), ([], 10), ([21], 21)]


@eight
@pytest.mark.parametrize(
    "name", ["conv", "mamba1", "mamba2", "mamba3", "mamba3_mimo", "language_model_untied"]
)
def test_pieces_are_one_sequence(name):
    """Outputs, final state and all gradients are those of one device."""
    layer = make_layer(name, SIZES[0], "float32", 0)
    x = jnp.asarray(make_inputs(name, SIZES[0], SEQ, "float32", 0))
    _, past = quick(lambda layer, x: layer.scan(x))(layer, x[:5])

    def alone(layer: Any, x: Any, state: Any, reset: Any, length: Any) -> Any:
        return layer.scan(x, state, reset=reset, length=length)

    def pieces(layer: Any, x: Any, state: Any, reset: Any, length: Any) -> Any:
        return mbx.context_scan(
            layer.scan, x, state, mesh=mesh(data=2, context=4), reset=reset, length=length
        )

    def run(how: Any) -> Any:
        def results(inputs: Any, reset: Any, length: Any) -> Any:
            y, state = how(*inputs, reset, length)
            real = jnp.arange(SEQ) < length
            y = jnp.where(real[:, None], y, jnp.zeros_like(y))
            return waves((y, state)), (y, state)

        gradient = eqx.filter_value_and_grad(results, has_aux=True)
        return quick(lambda *arguments: gradient(*arguments))

    one, many = run(alone), run(pieces)
    for resets, length in CASES:
        reset = jnp.zeros(SEQ, bool).at[jnp.array(resets, int)].set(True)
        arguments = ((layer, x, past), reset, jnp.int32(length))
        (_, found), found_gradients = many(*arguments)
        (_, want), want_gradients = one(*arguments)
        assert_close(jax.device_get(found), want, "float32")
        assert_close(jax.device_get(found_gradients), want_gradients, "float32")


@eight
@pytest.mark.parametrize("name", ["mamba1", "conv"])
def test_a_reset_forgets_nan_of_its_piece(name: str):
    layer = make_layer(name, SIZES[0], "float32", 0)
    x = jnp.asarray(make_inputs(name, SIZES[0], SEQ, "float32", 0)).at[13].set(jnp.nan)
    reset = jnp.arange(SEQ) == 17
    pieces = lambda layer, x: mbx.context_scan(
        layer.scan, x, mesh=mesh(data=2, context=4), reset=reset
    )
    y, state = quick(pieces)(layer, x)
    assert np.isfinite(y[17:]).all()
    want = quick(lambda layer, x: layer.scan(x))(layer, x[17:])
    assert_close(jax.device_get((y[17:], state)), want, "float32")


@eight
def test_rows_of_a_batch_are_sharded_too():
    """What crosses between devices has a size independent of the length, and stays in its rows."""
    layer = mbx.Mamba2(8, d_state=4, headdim=4, key=jr.key(0))
    xs = jr.normal(jr.key(1), (4, 80, 8))
    run = jax.jit(
        jax.vmap(lambda x: mbx.context_scan(layer.scan, x, mesh=mesh(data=2, context=4))[0])
    )
    want = jax.jit(jax.vmap(layer))(xs)
    sharded = jax.device_put(xs, NamedSharding(mesh(data=2, context=4), P("data", "context")))
    np.testing.assert_allclose(run(sharded), want, atol=1e-5)
    sizes = []
    for seq in (80, 320):
        xs = jnp.zeros((4, seq, 8))
        sharded = jax.device_put(xs, NamedSharding(mesh(data=2, context=4), P("data", "context")))
        sizes.append(collectives(str(run.lower(sharded).compile().as_text())))
    assert {each.loops for each in sizes[0]} == {0}
    assert sum(each.bytes for each in sizes[0]) == sum(each.bytes for each in sizes[1])


def test_refuses_what_cannot_run_in_pieces(as_users_run):
    layer = mbx.Mamba1(4, key=jr.key(0))
    x, reset = jnp.zeros((12, 4)), jnp.zeros(11, bool)
    cut = lambda devices: AbstractMesh((devices,), ("context",))
    with pytest.raises(ValueError, match="must have an axis 'context', but got the axes"):
        mbx.context_scan(layer.scan, x, mesh=AbstractMesh((2,), ("data",)))
    with pytest.raises(ValueError, match=r"got 5 devices and 12 tokens. Append padding"):
        mbx.context_scan(layer.scan, x, mesh=cut(5))
    with pytest.raises(ValueError, match="at least one token"):
        mbx.context_scan(layer.scan, x[:0], mesh=cut(4))
    with pytest.raises(ValueError, match=r"within 0\.\.12, but got length=13"):
        mbx.context_scan(layer.scan, x, mesh=cut(4), length=13)
    with pytest.raises(ValueError, match="shape \\(12,\\), one value per token, but got bool"):
        mbx.context_scan(layer.scan, x, mesh=cut(4), reset=reset)
    run = lambda layer, devices: jax.eval_shape(
        lambda x: mbx.context_scan(layer.scan, x, mesh=cut(devices)), x
    )
    with pytest.raises(ValueError, match=r"got 2 tokens on each device and d_conv=4. Use fewer"):
        run(layer, 6)
    for other in (
        mbx.Attention(4, nheads=2, key=jr.key(0)),
        mbx.GatedDeltaNet(4, headdim=4, key=jr.key(0)),
    ):
        with pytest.raises(ValueError, match="must get a whole sequence, but got a piece"):
            run(other, 2)
    sums = lambda x, state, reset, length: mbx.ops.linear_recurrence(jnp.ones_like(x), x)
    with pytest.raises(ValueError, match="`linear_recurrence` must get a whole sequence"):
        jax.eval_shape(lambda x: mbx.context_scan(sums, x, mesh=cut(2)), x)
