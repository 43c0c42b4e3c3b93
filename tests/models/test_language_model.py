"""`LanguageModel` without the layers inside it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_tokens_have_any_integer_dtype(dtype: str):
    """The vocabulary may be larger than the dtype: JAX adds its size to negative indices."""
    stack = mbx.Unrolled([mbx.CausalConv1d(2, key=jr.key(0))])
    model = mbx.LanguageModel(stack, vocab_size=40_000, key=jr.key(1))
    tokens = jnp.array([3, 127, 0])
    want = model.hidden_states(tokens)
    np.testing.assert_array_equal(model.hidden_states(tokens.astype(dtype)), want)
    step = jax.eval_shape(model.step, tokens[0].astype(dtype), model.init_state())
    assert step[0].shape == (40_000,)
