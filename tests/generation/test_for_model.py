"""Tests of `Sampling.for_model`."""

import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.text import SpecialIds
from tests.support.generation import MODEL


pytestmark = pytest.mark.usefixtures("as_users_run")

BLOCK = mbx.BlockConfig(mbx.Mamba1Config(4, d_state=2))
WIDE = mbx.LanguageModelConfig(260, (BLOCK,)).build(key=jr.key(0))
# Of the ids above 255, 256 and 258 are tokens. The model lacks 300.
TOKENIZER = mbx.ByteTokenizer(ids=SpecialIds(bos=258, eos=(256, 300)))


def test_ends_texts_and_bans_the_ids_of_no_token():
    sampling = mbx.Sampling(temperature=0.5, top_k=3).for_model(WIDE, TOKENIZER)
    assert sampling.temperature == 0.5
    assert sampling.top_k == 3
    assert sampling.tokenizer is TOKENIZER
    assert sampling.stop_tokens == [256]
    assert sampling.logit_bias == {257: -math.inf, 259: -math.inf}


def test_keeps_the_bias_and_the_stop_tokens():
    given = mbx.Sampling(logit_bias={3: 2.0, 257: 1.0}, stop_tokens={10})
    sampling = given.for_model(WIDE, TOKENIZER)
    assert sampling.stop_tokens == [10, 256]
    assert sampling.logit_bias == {3: 2.0, 257: -math.inf, 259: -math.inf}
    assert given.logit_bias == {3: 2.0, 257: 1.0}
    # A stop token is not banned, though the tokenizer lacks it.
    assert mbx.Sampling(stop_tokens=[259]).for_model(WIDE, TOKENIZER).logit_bias == {257: -math.inf}
    rows = mbx.Sampling(stop_tokens=[[10], {257}, []]).for_model(WIDE, TOKENIZER)
    assert rows.stop_tokens == [[10, 256], [257, 256], [256]]
    assert rows.logit_bias == {259: -math.inf}


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_keeps_a_bias_of_arrays(array):
    bias = array(np.arange(260.0, dtype=np.float32))
    found = np.asarray(mbx.Sampling(logit_bias=bias).for_model(WIDE, TOKENIZER).logit_bias)
    banned = [257, 259]
    assert (found[banned] == -math.inf).all()
    np.testing.assert_array_equal(np.delete(found, banned), np.delete(np.arange(260.0), banned))
    np.testing.assert_array_equal(bias, np.arange(260.0))


def test_bans_nothing_where_every_id_is_a_token():
    sampling = mbx.Sampling().for_model(MODEL, mbx.ByteTokenizer())
    assert sampling.logit_bias is None
    assert sampling.stop_tokens == []
    mbx.beam_search(MODEL, [1], 2, sampling)


def test_errors():
    class Far(mbx.ByteTokenizer):
        @property
        def token_ids(self) -> frozenset[int]:
            return frozenset({900})

    with pytest.raises(ValueError, match="must be a `TextTokenizer` or a `ByteTokenizer`, but got"):
        mbx.Sampling().for_model(MODEL, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tokens within the model's vocabulary 0\.\.10, but got"):
        mbx.Sampling().for_model(MODEL, Far())
    with pytest.raises(ValueError, match=r"shape \(260,\).* shape \(3,\)"):
        mbx.Sampling(logit_bias=np.zeros(3, np.float32)).for_model(WIDE, TOKENIZER)
