"""Tests of generation from a learned initial state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx import decoding_state
from tests.support.cases import quick
from tests.support.generation import MODEL


pytestmark = pytest.mark.usefixtures("compile_fast")

TEXT = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(scope="module")
def learned():
    """Trains an initial state that makes `TEXT` likely."""
    optimiser = optax.adam(0.3)

    @quick
    def step(state, opt_state, model):
        def loss(state):
            out, _ = model.scan(TEXT[:-1], state)
            return optax.softmax_cross_entropy_with_integer_labels(out, TEXT[1:]).mean()

        value, grads = jax.value_and_grad(loss)(state)
        updates, opt_state = optimiser.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, value

    state, losses = MODEL.init_state(), []
    opt_state = optimiser.init(state)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it.
        for _ in range(100):
            state, opt_state, value = step(state, opt_state, MODEL)
            losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]  # The model has random weights.
    return state


@quick
def next_token(tokens, state, length):
    return jnp.argmax(MODEL.scan(tokens, state)[0][length - 1, : MODEL.vocab_size])


def naive(prompt, state, n):
    tokens = list(prompt)
    for _ in range(n):
        padded = jnp.asarray((tokens + [0] * 16)[:16])
        tokens.append(int(next_token(padded, state, len(tokens))))
    return tokens[len(prompt) :]


def test_generation_starts_from_a_learned_state(learned, tmp_path):
    prefix = decoding_state(MODEL, learned, 3)
    want = naive([3, 1], learned, 6)
    assert prefix.recent.tolist() == [-1] * 63 + [3]
    assert want != naive([3, 1], MODEL.init_state(), 6)
    assert mbx.generate(MODEL, [1], 6, state=prefix).tokens.tolist() == want
    assert mbx.generate(MODEL, None, 6, state=prefix).tokens.tolist() == naive([3], learned, 6)
    mbx.save_state(tmp_path / "prefix", prefix, MODEL)
    assert eqx.tree_equal(mbx.load_state(tmp_path / "prefix", MODEL), prefix)


def test_state_from_the_empty_past_equals_plain_generation():
    """Random numbers and penalties agree too."""
    key = jr.key(1)
    sampling = mbx.Sampling(temperature=1.0, penalties=mbx.sampling.Penalties(repetition=1.5))
    prefix = decoding_state(MODEL, MODEL.init_state(), 3)
    got = mbx.generate(MODEL, [1, 3], 8, sampling, state=prefix, key=key)
    want = mbx.generate(MODEL, [3, 1, 3], 8, sampling, key=key)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.state.recent, want.state.recent)


def test_invalid_states_raise(as_users_run):
    with pytest.raises(ValueError, match=r"`token` must be within 0\.\.10, but got 11"):
        decoding_state(MODEL, MODEL.init_state(), 11)
    with pytest.raises(ValueError, match="must be a tuple as returned by `init_state`"):
        decoding_state(MODEL, MODEL.init_state()[:1], 1)
    batch = jax.tree.map(lambda leaf: leaf[None], MODEL.init_state())
    with pytest.raises(ValueError, match=r"\.conv` given to `Unrolled` must be"):
        decoding_state(MODEL, batch, 1)
