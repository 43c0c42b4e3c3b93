import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from ._language_model import LanguageModel


def fingerprint(model: LanguageModel) -> np.ndarray:
    """32 bytes that differ between models which differ in any parameter, dtype or name."""
    text = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        text.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} ".encode())
        text.update(np.asarray(_checksum(leaf)).tobytes())
    return np.frombuffer(text.digest(), np.uint8)


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, "2"]:
    """Sums of all bits with odd weights, modulo 2^32: as fast as memory, and no single change goes
    unnoticed. (It is no protection against someone who wants it to.)"""
    size = leaf.dtype.itemsize
    bits = lax.bitcast_convert_type(leaf, jnp.uint32 if size >= 4 else f"uint{8 * size}")
    bits = bits.reshape(-1).astype(jnp.uint32)
    index = lax.iota(jnp.uint32, bits.size)
    weights = jnp.stack([2 * index + 1, (index ^ (index >> 7)) * jnp.uint32(0x9E3779B2) + 1])
    return jnp.sum(weights * bits, axis=1, dtype=jnp.uint32)
