"""The small model that the tests of generation run, and a naive loop to compare with."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from hypothesis import strategies as st

import mamba_eqx as mbx


VOCAB = 11
KEY = jr.key(5)
FILTERS: dict[str, Any] = {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.01}
SAMPLING = mbx.Sampling(**FILTERS)


def make(*, stacked=False, padded=VOCAB + 5, scale=60.0):
    """Builds a small model with few near-ties, whose order rounding could reverse."""
    block = mbx.BlockConfig(mbx.Mamba1Config(6, d_inner=10, d_state=4))
    config = mbx.LanguageModelConfig(
        VOCAB, (block,) * 2, padded_vocab_size=padded, tie_embeddings=False
    )
    model = config.build(stacked=stacked, key=jr.key(3))
    assert model.lm_head is not None
    where = lambda model: (model.embedding.weight, model.lm_head.weight)
    # Rows of padding have the largest logits, so that a missing mask would show.
    head = 4 * model.lm_head.weight
    head = head.at[VOCAB:].set(50 * head[:1])
    model = eqx.tree_at(where, model, (scale * model.embedding.weight, head))
    # The mixers outweigh the last token, so that the past matters.
    mixers = lambda model: model.layers.layers.mixer.out_proj.weight
    if not stacked:
        mixers = lambda model: [b.mixer.out_proj.weight for b in model.layers.layers]
    return eqx.tree_at(mixers, model, replace_fn=lambda weight: 30 * weight)


MODEL = make()
PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)


def naive(model, prompt, n, *, key=None, stop=(), **options):
    """Returns the tokens and their log-probabilities, running the whole sequence for each token."""
    tokens, log_probs = list(prompt), []
    for _ in range(n):
        padded = jnp.asarray((tokens + [0] * 64)[:64])
        logits = FORWARD(model, padded)[len(tokens) - 1, :VOCAB]
        if key is None:
            token = int(jnp.argmax(logits))
        else:
            token = int(SAMPLE(logits, jr.fold_in(key, len(tokens) - 1), **options))
        log_probs.append(float(jax.nn.log_softmax(logits)[token]))
        tokens.append(token)
        if token in stop:
            break
    return tokens[len(prompt) :], log_probs


FORWARD = eqx.filter_jit(lambda model, tokens: model(tokens))
SAMPLE = jax.jit(mbx.sampling.sample)


def row(out, i=None):
    """Returns the real tokens of a row after checking its padding."""
    pick = out if i is None else jax.tree.map(lambda leaf: leaf[i], out)
    n = int(pick.length)
    np.testing.assert_array_equal(pick.tokens[n:], -1)
    np.testing.assert_array_equal(pick.log_probs[n:], 0)
    assert bool(pick.stopped) or n == len(pick.tokens)
    return pick.tokens[:n].tolist()
