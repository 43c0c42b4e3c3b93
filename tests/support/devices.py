"""The meshes, the batch, and the runs of the tests on several devices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from mamba_eqx import training


ROWS, SEQ, VOCAB = 16, 40, 101


def mesh(**sizes: int) -> Any:
    """Makes a mesh whose axes have these names and sizes."""
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def waves(tree: Any) -> Any:
    """Returns a number to which every entry of the arrays contributes differently."""
    factors = lambda leaf: 1 + jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) % 7
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.sin(leaf * factors(leaf))) for leaf in leaves)


def batch() -> training.Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, ROWS, SEQ), np.int32)
    flags = rng.random((2, ROWS, SEQ)) < 0.3
    return training.Batch(*map(jnp.asarray, (tokens[0], tokens[1], flags[0], flags[1])))


def train(step: Any, state: Any, rows: Any) -> Any:
    metrics = {}
    for _ in range(3):
        state, metrics = step(state, rows)
    return jax.device_get(eqx.filter((state, metrics), eqx.is_inexact_array))
