"""The ops validate their arguments and name them in the errors."""

from typing import Any

import jax.numpy as jnp
import pytest

from mamba_eqx import ops


pytestmark = pytest.mark.usefixtures("as_users_run")


X = jnp.ones((3, 2))
HEADS = jnp.ones((3, 4, 2))
PER_HEAD = jnp.ones((3, 4))
B = jnp.ones((3, 2, 5))
B_PER_RANK = jnp.ones((3, 1, 2, 5))
BIAS = jnp.ones((4, 1, 5))
MAMBA3: dict[str, Any] = {
    "trap": PER_HEAD,
    "angles": jnp.ones((3, 2)),
    "B_bias": BIAS,
    "C_bias": BIAS,
    "interleaved": True,
}


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_without_tokens_raise(chunk_size: int):
    message = rf"`chunk_size` must be at least 1, but got chunk_size={chunk_size}"
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(X, X, -X[:2], X, X, None, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(X, X, -X[:2], X, X, None, method="associative", chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        ops.ssd(HEADS, PER_HEAD, -PER_HEAD[0], B, B, None, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        ops.gated_delta(B, B, HEADS, -PER_HEAD, PER_HEAD, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=message):
        ops.mamba3(
            HEADS,
            PER_HEAD,
            -PER_HEAD,
            B_PER_RANK,
            B_PER_RANK,
            None,
            **MAMBA3,
            chunk_size=chunk_size,
        )


def test_options_are_checked_without_tokens():
    empty = [t[:0] for t in (HEADS, PER_HEAD, -PER_HEAD, B_PER_RANK, B_PER_RANK)]
    tokens = {name: MAMBA3[name][:0] for name in ("trap", "angles")}
    with pytest.raises(ValueError, match=r'`method` must be "chunked".*\'fast\''):
        ops.mamba3(*empty, None, **(MAMBA3 | tokens | {"method": "fast"}))
    with pytest.raises(ValueError, match=r"`chunk_size` must be at least 1"):
        ops.mamba3(*empty, None, **(MAMBA3 | tokens | {"chunk_size": 0}))
    with pytest.raises(ValueError, match=r"`block_size` must be at least 1"):
        ops.attention(HEADS[:0], HEADS[:0], HEADS[:0], block_size=0)


@pytest.mark.parametrize("block_size", [0, -1])
def test_blocks_without_queries_raise(block_size: int):
    with pytest.raises(ValueError, match=rf"`block_size` must be .* got block_size={block_size}"):
        ops.attention(HEADS, HEADS, HEADS, block_size=block_size)
