"""The small model and the batches that the tests of training share."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mamba_eqx as mbx
from mamba_eqx import training


VOCAB, ROWS, SEQ = 11, 3, 10


@functools.cache
def model(mixer=mbx.Mamba1Config(8, d_state=4), rows=VOCAB + 2):  # noqa: B008
    config = mbx.LanguageModelConfig(VOCAB, (mbx.BlockConfig(mixer),), padded_vocab_size=rows)
    return config.build(key=jr.key(0), dtype=jnp.float32)


def batch_of(seed, rows=ROWS, seq=SEQ):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, seq + 1)).astype(np.int32)
    return training.Batch(
        jnp.asarray(tokens[:, :-1]),
        jnp.asarray(tokens[:, 1:]),
        jnp.asarray(rng.random((rows, seq)) < 0.2),
        rng.random((rows, seq)) < 0.7,
    )


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (np.abs(b).max() + 1e-8))
