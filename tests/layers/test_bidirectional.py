"""`Bidirectional` against its definition, with packed documents and padding."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, strategies as st

import mamba_eqx as mbx
from tests.support.cases import assert_close, quick
from tests.support.registry import SIZES, make_inputs, make_layer


pytestmark = pytest.mark.usefixtures("compile_fast")


SEQ = 9
S = SIZES[0]
names = pytest.mark.parametrize("name", ["conv", "mamba2", "unrolled"])
shared = pytest.mark.parametrize("shared", [True, False])


def make(name: str, shared: bool) -> mbx.Bidirectional:
    forward, backward = (make_layer(name, S, "float32", seed) for seed in (0, 1))
    return mbx.Bidirectional(forward) if shared else mbx.Bidirectional(forward, backward)


def inputs(name: str, seed: int = 0) -> np.ndarray:
    return make_inputs(name, S, SEQ, "float32", seed)


@quick
def run(layer: Any, x: Any, reset: Any = None, length: Any = None) -> Any:
    return layer(x, reset=reset, length=length)


def run_separately(layer: mbx.Bidirectional, x: np.ndarray) -> np.ndarray:
    """Runs both directions separately, as the definition does."""
    backward = layer.forward if layer.backward is None else layer.backward
    return np.asarray(run(layer.forward, x)) + np.asarray(run(backward, x[::-1]))[::-1]


@pytest.mark.slow
@names
@shared
def test_equals_definition(name: str, shared: bool):
    layer, x = make(name, shared), inputs(name)
    assert_close(np.asarray(run(layer, x)), run_separately(layer, x), "float32")


@pytest.mark.slow
@names
@shared
@given(data=st.data())
def test_packed_documents_are_independent(name: str, shared: bool, data: Any):
    """Each packed document gives the outputs that it gives alone, whatever the padding holds."""
    layer, x = make(name, shared), inputs(name)
    length = data.draw(st.sampled_from([0, 1, 4, SEQ - 1, SEQ]))
    starts = data.draw(st.frozensets(st.integers(0, SEQ - 1)))
    x[length:] = np.nan
    reset = np.isin(np.arange(SEQ), [*starts])
    got = np.asarray(run(layer, x, reset, np.array(length)))
    assert got.shape == x.shape
    borders = sorted({0, length} | {start for start in starts if start < length})
    for begin, end in itertools.pairwise(borders):
        # One length for all documents avoids compiling for each.
        alone = np.full_like(x, 7.0)
        alone[: end - begin] = x[begin:end]
        want = np.asarray(run(layer, alone, np.zeros(SEQ, bool), np.array(end - begin)))
        assert_close(got[begin:end], want[: end - begin], "float32")


@shared
@pytest.mark.parametrize(
    "length", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2)), 3]
)
def test_padding_has_no_effect(shared: bool, length: int):
    """`length` gives the outputs of the shorter sequence."""
    layer, x = make("mamba1", shared), inputs("mamba1")
    got = np.asarray(run(layer, x, None, np.array(length)))[:length]
    assert_close(got, run_separately(layer, x[:length]), "float32")
    assert_close(np.asarray(layer(jnp.asarray(x), length=length))[:length], got, "float32")


@pytest.mark.slow
@shared
def test_padding_reaches_no_gradient(shared: bool):
    layer, x = make("mamba1", shared), inputs("mamba1")
    x[5:] = np.nan

    def loss(layer: Any, x: Any, length: Any = None) -> Any:
        return jnp.sum(jnp.sin(layer(x, length=length)[:5]))

    gradient = quick(jax.grad(loss, argnums=(0, 1)))
    of_layer, of_x = gradient(layer, x, np.uint8(5))
    assert not of_x[5:].any()
    assert_close((of_layer, of_x[:5]), gradient(layer, x[:5]), "float32")


@pytest.mark.slow
@shared
@pytest.mark.parametrize("t", range(3, 7))
def test_outputs_depend_on_their_own_document_only(shared: bool, t: int):
    layer, x = make("mamba1", shared), inputs("mamba1")
    reset, length = np.isin(np.arange(SEQ), [3, 7]), np.array(8)
    other = x.copy()
    other[t] += 1
    changed = (run(layer, x, reset, length) != run(layer, other, reset, length)).any(axis=-1)
    assert [*changed[:8]] == [3 <= i < 7 for i in range(8)]


def test_shared_weights():
    """The gradient of shared weights is the sum of both directions' gradients."""
    layer, x = make("mamba2", shared=True), jnp.asarray(inputs("mamba2"))
    twice = mbx.Bidirectional(layer.forward, layer.forward)
    assert len(jax.tree.leaves(twice)) == 2 * len(jax.tree.leaves(layer))
    assert_close(run(twice, x), run(layer, x), "float32")
    gradient = quick(jax.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), argnums=(0, 1)))
    (of_one, x_bar), (of_two, x_bar_2) = gradient(layer, x), gradient(twice, x)
    both = jax.tree.map(jnp.add, of_two.forward, of_two.backward)
    assert_close((of_one.forward, x_bar), (both, x_bar_2), "float32")


@pytest.mark.slow
@names
def test_vmap_equals_loop(name: str):
    layer = make(name, shared=False)
    x = np.stack([inputs(name, seed) for seed in range(3)])
    reset = np.random.default_rng(0).random((3, SEQ)) < 0.3
    length = np.array([SEQ, 0, 4])
    batched = np.asarray(jax.vmap(run, in_axes=(None, 0, 0, 0))(layer, x, reset, length))
    for i, n in enumerate(length):
        want = np.asarray(run(layer, x[i], reset[i], length[i]))
        assert_close(batched[i, :n], want[:n], "float32")


def test_empty_sequence():
    layer = make("conv", shared=True)
    assert layer(jnp.zeros((0, S.d_model)), reset=jnp.zeros(0, bool), length=0).shape[0] == 0


def test_fits_into_sequential():
    layer, x = make("conv", shared=True), jnp.asarray(inputs("conv"))
    assert_close(eqx.nn.Sequential([layer])(x, key=jr.key(0)), layer(x), "float32")
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_is_not_a_sequence_layer():
    """Outputs depend on later tokens, so the class has none of the protocol's methods."""
    layer = make("conv", shared=True)
    assert not isinstance(layer, mbx.AbstractSequenceLayer)
    for verb in ("step", "scan", "init_state"):
        assert not hasattr(layer, verb)


@pytest.mark.usefixtures("as_users_run")
def test_invalid_arguments_raise():
    layer = mbx.Bidirectional(mbx.Mamba1(6, d_state=3, key=jr.key(0)))
    with pytest.raises(ValueError, match=r"whole sequence.*\(seq, 6\).*\(2, 4, 6\).*jax.vmap"):
        layer(jnp.zeros((2, 4, 6)))
    with pytest.raises(ValueError, match=r"`Bidirectional`.*d_model=6.*\(4, 5\)"):
        layer(jnp.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"`Bidirectional`.*floating-point.*int32"):
        layer(jnp.zeros((4, 6), jnp.int32))
    with pytest.raises(ValueError, match=r"`reset` of `Bidirectional`.*\(4,\).*\(3,\)"):
        layer(jnp.zeros((4, 6)), reset=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match=r"`length` of `Bidirectional`.*0\.\.4.*length=5"):
        layer(jnp.zeros((4, 6)), length=5)
    with pytest.raises(ValueError, match=r"share `d_model`.*6 and 7"):
        mbx.Bidirectional(layer.forward, mbx.CausalConv1d(7, key=jr.key(0)))
