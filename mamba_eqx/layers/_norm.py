from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import ops
from .._checks import check_flag, check_fraction, check_positive, to_python
from .._dtypes import default_dtype


Norm: TypeAlias = eqx.nn.RMSNorm | eqx.nn.LayerNorm


def make_norm(d_model: int, *, rms_norm: bool, eps: float, dtype: DTypeLike | None) -> Norm:
    """Makes the norm of a block or of a model.

    As in the official code, an RMSNorm has no bias and a LayerNorm has one.
    """
    eps = to_python(eps)
    check_flag("rms_norm", rms_norm)
    check_fraction("norm_eps", eps)
    dtype = default_dtype() if dtype is None else dtype
    if rms_norm:
        return eqx.nn.RMSNorm(d_model, eps, use_bias=False, dtype=dtype)
    return eqx.nn.LayerNorm(d_model, eps, dtype=dtype)


class GatedRMSNorm(eqx.Module):
    """A gated root-mean-square norm over groups of channels, with a weight for each channel.

    See [`mamba_eqx.ops.gated_rms_norm`][] for the equations.
    """

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

        - `channels`: the size of the last axis.
        - `ngroups`: the number of groups of channels, each normalised separately. It must divide
            `channels`.
        - `eps`: a number between 0 and 1, added to the mean square.
        - `norm_before_gate`: whether to normalise before the gate is applied, rather than after.
        - `dtype`: the dtype of the weight, which starts at one; float32 by default (float64 in
            JAX's 64-bit mode).

        **Raises:** `ValueError` if a size is not a positive integer, `ngroups` does not divide
        `channels`, `eps` is not between 0 and 1, or `norm_before_gate` is not a bool.
        """
        check_positive("channels", channels)
        check_positive("ngroups", ngroups)
        if channels % ngroups:
            raise ValueError(
                f"`ngroups` must divide `channels`, but got ngroups={ngroups} and "
                f"channels={channels}."
            )
        eps = to_python(eps)
        check_fraction("eps", eps)
        check_flag("norm_before_gate", norm_before_gate)
        self.weight = jnp.ones(channels, default_dtype() if dtype is None else dtype)
        self.ngroups = ngroups
        self.eps = eps
        self.norm_before_gate = norm_before_gate

    def __call__(
        self, x: Float[Array, "*seq channels"], z: Float[Array, "*seq channels"]
    ) -> Float[Array, "*seq channels"]:
        """Normalises and gates.

        **Arguments:**

        - `x`: the values, an array of shape `(..., channels)`.
        - `z`: the gate, before its SiLU, of the same shape.

        **Returns:**

        An array of the same shape.
        """
        return ops.gated_rms_norm(
            x,
            z,
            self.weight,
            ngroups=self.ngroups,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
        )
