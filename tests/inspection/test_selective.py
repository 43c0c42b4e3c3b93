"""What is read from selective mixers is what they compute."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, strategies as st

import mamba_eqx as mbx
from mamba_eqx import inspection


pytestmark = pytest.mark.usefixtures("compile_fast")

SEQ = 7
MIXERS = {
    "mamba1": lambda key: mbx.Mamba1(4, d_state=3, key=key),
    "mamba2": lambda key: mbx.Mamba2(8, d_state=3, headdim=4, ngroups=2, key=key),
}
mixers = pytest.mark.parametrize("name", MIXERS)


@functools.cache
def make(name, seed=0):
    mixer = MIXERS[name](jr.key(seed))
    # New models have decay rates and skip connections that do not differ between channels.
    A_log, D = (jr.normal(jr.key(seed + 1), leaf.shape) for leaf in (mixer.A_log, mixer.D))
    return eqx.tree_at(lambda m: (m.A_log, m.D), mixer, (A_log, D))


@functools.cache
def looked(name):
    """Compiles everything that the tests of a mixer read, once."""

    def look(mixer, x):
        u, dt, B, C = mixer.select(x)[:4]
        op = mbx.ops.selective_scan if name == "mamba1" else mbx.ops.ssd
        y, _ = op(u, dt, mixer.A, B, C, mixer.D)
        return {
            "u": u.reshape(SEQ, mixer.D.shape[0], -1),
            "y": y.reshape(SEQ, mixer.D.shape[0], -1),
            "M": inspection.mixing_matrices(mixer, x),
            "dt": inspection.step_sizes(mixer, x),
            "norms": inspection.state_norms(mixer, x),
            "half_lives": inspection.half_lives(mixer, x),
            "last": mixer.scan(x)[1].ssm,
        }

    return eqx.filter_jit(look)


def look(name, seed, scale=1.0):
    mixer = make(name)
    return mixer, looked(name)(mixer, scale * jr.normal(jr.key(seed), (SEQ, mixer.d_model)))


@mixers
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_matrix_times_inputs_is_the_output_of_the_op(name, seed, scale):
    _, seen = look(name, seed, scale)
    product = jnp.einsum("cts,scp->tcp", seen["M"], seen["u"])
    bound = 1e-5 * float(jnp.abs(seen["y"]).max())
    np.testing.assert_allclose(product, seen["y"], rtol=0, atol=bound)


@mixers
def test_matrices_are_causal(name):
    _, seen = look(name, 0)
    assert not jnp.triu(seen["M"], 1).any()


@mixers
def test_last_norm_is_that_of_the_state(name):
    _, seen = look(name, 0)
    axes = 0 if name == "mamba1" else (0, 2)
    expected = jnp.sqrt(jnp.sum(seen["last"] ** 2, axis=axes))
    np.testing.assert_allclose(seen["norms"][-1], expected, rtol=1e-5)


@mixers
def test_state_decays_to_a_half_in_a_half_life(name):
    mixer, seen = look(name, 0)
    mean = seen["dt"].mean(0)
    rate = mean[:, None] * mixer.A if name == "mamba1" else mean * mixer.A
    np.testing.assert_allclose(jnp.exp(rate * seen["half_lives"]), 0.5, rtol=1e-5)
    assert seen["half_lives"].shape == mixer.A_log.shape


def test_inputs_of_a_model_are_those_of_its_mixers():
    block = mbx.BlockConfig(mbx.Mamba1Config(4, d_state=3))
    config = mbx.LanguageModelConfig(16, (block,) * 2, embedding_multiplier=3.0)
    model = config.build(stacked=True, key=jr.key(0))
    tokens = jnp.arange(SEQ)
    first, second = inspection.mixer_inputs(model, tokens)
    assert (first.path, second.path) == ("layers.layers.0.mixer", "layers.layers.1.mixer")
    one, two = model.layers.unstack()
    assert isinstance(one, mbx.Block)
    assert isinstance(two, mbx.Block)
    x = 3 * jax.vmap(model.embedding)(tokens)
    np.testing.assert_allclose(first.x, jax.vmap(one.norm)(x), rtol=1e-5)
    np.testing.assert_allclose(second.x, jax.vmap(two.norm)(one(x)), rtol=1e-4, atol=1e-5)


def test_mixers_without_one_matrix_per_head_are_refused():
    mixer = mbx.Mamba2(4, d_state=3, headdim=4, D_has_hdim=True, key=jr.key(0))
    with pytest.raises(ValueError, match="D_has_hdim=True"):
        inspection.mixing_matrices(mixer, jnp.ones((2, 4)))


def test_half_lives_need_a_token():
    with pytest.raises(ValueError, match="at least one token"):
        inspection.half_lives(make("mamba1"), jnp.ones((0, 4)))


def test_half_life_of_a_known_rate():
    """A rate of 1 and a step size of ln 2 halve the state with every token."""
    mixer = make("mamba1")
    zeros = jnp.zeros_like
    mixer = eqx.tree_at(
        lambda m: (m.A_log, m.dt_proj.weight, m.dt_bias),
        mixer,
        (zeros(mixer.A_log), zeros(mixer.dt_proj.weight), zeros(mixer.dt_bias)),
    )
    # The softplus of 0 is ln 2.
    np.testing.assert_allclose(inspection.half_lives(mixer, jnp.ones((3, 4))), 1.0, rtol=1e-6)
    assert math.isclose(
        float(inspection.step_sizes(mixer, jnp.ones((3, 4)))[0, 0]), math.log(2), rel_tol=1e-6
    )
