import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._dtypes import at_least_float32


@jax.named_scope("mamba_eqx.ops.gated_rms_norm")
def gated_rms_norm(
    x: Float[Array, "*seq channels"],
    z: Float[Array, "*seq channels"],
    weight: Float[Array, " channels"],
    *,
    ngroups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    axis_name: str | None = None,
) -> Float[Array, "*seq channels"]:
    r"""Normalises gated channels by their root mean square (official `RMSNormGated`),

    $$\mathrm{norm}(x \odot \mathrm{silu}(z)), \quad \text{or} \quad
      \mathrm{norm}(x) \odot \mathrm{silu}(z) \quad \text{if norm\_before\_gate}, \qquad
      \mathrm{norm}(v) = \frac{v}{\sqrt{\mathrm{mean}(v^2) + \epsilon}} \odot w,$$

    where the mean is over each of `ngroups` groups of neighbouring channels.

    **Arguments:**

    - `x`: the values, shape `(*seq, channels)`.
    - `z`: the gate, shape `(*seq, channels)`.
    - `weight`: the factor $w$ of every channel, shape `(channels,)`.
    - `ngroups`: the number of groups, which divides the number of channels.
    - `eps`: the positive number $\epsilon$.
    - `norm_before_gate`: whether to normalise before gating, as in the second formula.
    - `axis_name`: inside `jax.shard_map`, the mesh axis over whose devices the channels of every
        group are distributed; `None` if a device has all of them.

    **Returns:**

    The normalised values, shape `(*seq, channels)`, in the dtype of `x`. They are computed in
    float32 or better.
    """
    dtype = at_least_float32(x, z, weight)
    y, gate = x.astype(dtype), jax.nn.silu(z.astype(dtype))
    if not norm_before_gate:
        y = y * gate
    groups = y.reshape(*y.shape[:-1], ngroups, y.shape[-1] // ngroups)
    mean = jnp.mean(groups**2, axis=-1, keepdims=True)
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    scale = lax.rsqrt(mean + eps)
    y = (groups * scale).reshape(y.shape) * weight.astype(dtype)
    if norm_before_gate:
        y = y * gate
    return y.astype(x.dtype)
