import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import ops
from .._checks import check_positive
from .._dtypes import default_dtype


def norm(
    d_model: int, *, rms_norm: bool, eps: float, dtype: DTypeLike | None
) -> eqx.nn.RMSNorm | eqx.nn.LayerNorm:
    """The norm of a block or of a model; an official RMSNorm has no bias, a LayerNorm has one."""
    if not eps > 0:
        raise ValueError(f"`norm_eps` must be positive, but got norm_eps={eps}.")
    dtype = default_dtype() if dtype is None else dtype
    if rms_norm:
        return eqx.nn.RMSNorm(d_model, eps, use_bias=False, dtype=dtype)
    return eqx.nn.LayerNorm(d_model, eps, dtype=dtype)


class GatedRMSNorm(eqx.Module):
    """[`mamba_eqx.ops.gated_rms_norm`][] with its weight: over the last axis, in groups."""

    weight: Float[Array, " channels"]
    ngroups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    norm_before_gate: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        *,
        ngroups: int = 1,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `channels`: the length of the last axis.
        - `ngroups`: groups of channels, each with a norm of its own.
        - `eps`: added to the mean square.
        - `norm_before_gate`: whether the gate comes after the norm.
        - `dtype`: of the weight, which starts at one; float32 by default (float64 in JAX's 64-bit
            mode).
        """
        check_positive("channels", channels)
        check_positive("ngroups", ngroups)
        if channels % ngroups:
            raise ValueError(
                "`ngroups` must divide the channels, but got "
                f"ngroups={ngroups} and channels={channels}."
            )
        if not eps > 0:
            raise ValueError(f"`norm_eps` must be positive, but got norm_eps={eps}.")
        self.weight = jnp.ones(channels, default_dtype() if dtype is None else dtype)
        self.ngroups = ngroups
        self.eps = eps
        self.norm_before_gate = norm_before_gate

    def __call__(
        self, x: Float[Array, "*seq channels"], z: Float[Array, "*seq channels"]
    ) -> Float[Array, "*seq channels"]:
        """**Arguments:**

        - `x`: the values.
        - `z`: their gate.
        """
        return ops.gated_rms_norm(
            x,
            z,
            self.weight,
            ngroups=self.ngroups,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
        )
