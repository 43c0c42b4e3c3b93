import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from ._language_model import LanguageModel


def fingerprint(model: LanguageModel) -> np.ndarray:
    """Computes a hash of a model's parameters.

    **Returns:**

    32 bytes, an array of shape `(32,)`. Models that differ in the name, shape, dtype or value of a
    parameter have different hashes, barring a collision.
    """
    text = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        text.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} ".encode())
        text.update(np.asarray(_checksum(leaf)).tobytes())
    return np.frombuffer(text.digest(), np.uint8)


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, "2"]:
    """Computes two weighted sums of the words of `leaf`, modulo 2^32.

    The first sum has odd weights, so that any change of a single word is detected. This is not a
    cryptographic hash; it is limited by the bandwidth of memory only.
    """
    size = leaf.dtype.itemsize
    bits = lax.bitcast_convert_type(leaf, jnp.uint32 if size >= 4 else f"uint{8 * size}")
    bits = bits.reshape(-1).astype(jnp.uint32)
    index = lax.iota(jnp.uint32, bits.size)
    weights = jnp.stack([2 * index + 1, (index ^ (index >> 7)) * jnp.uint32(0x9E3779B2) + 1])
    return jnp.sum(weights * bits, axis=1, dtype=jnp.uint32)
