import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ... import ops
from ..._checks import to_python
from ..._dtypes import at_least_float32, default_dtype
from .._arguments import check_token, checked_sequence, checked_state
from .._initialisers import init_dt_bias
from .._linear import AbstractLinear, Linear
from .._norm import GatedRMSNorm
from .._protocol import AbstractSequenceLayer, Length, Reset
from .._recurrence_parameters import RECURRENCE
from ._validation import check_dt, check_mamba3


class Mamba3State(eqx.Module):
    """The state of [`mamba_eqx.Mamba3`][]. All arrays are at least in float32.

    - `angle`: the angle by which each pair of dimensions has rotated, between -pi and pi.
    - `ssm`: the hidden state. The heads are its first axis and the summed dimensions its last,
        which makes `step` several times faster than the order of [`mamba_eqx.Mamba2State`][].
    - `k`: the rotated keys of the last token.
    - `v`: the values of the last token, which are its $u$ in the equations of `Mamba3`.
    """

    angle: Float[Array, "nheads pairs"]
    ssm: Float[Array, "nheads headdim d_state"]
    k: Float[Array, "rank nheads d_state"]
    v: Float[Array, "nheads headdim"]


class _Projected(NamedTuple):
    """The output of `in_proj`, split, normalised and activated."""

    z: Float[Array, "*seq nheads headdim"]
    u: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    A: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq rank ngroups d_state"]
    C: Float[Array, "*seq rank ngroups d_state"]
    trap: Float[Array, "*seq nheads"]
    angles: Float[Array, "*seq pairs"]


class Mamba3(AbstractSequenceLayer[Mamba3State]):
    r"""The Mamba-3 mixer: a gated, selective state-space model with a rotating hidden state, and a
    trapezoidal rule in place of a convolution.

    With $\sigma$ = SiLU, and for every head, with $P$ = `headdim` channels and $N$ = `d_state`,

    $$\begin{aligned}
    z, u, B, C, \delta, a, \tau, \omega &= W_\mathrm{in} x, \\
    \Delta &= \mathrm{softplus}(\delta + b_\mathrm{dt}), \quad \lambda = \mathrm{sigmoid}(\tau), \\
    A &= -\max(f(a), \texttt{A\_floor}), \\
    \theta_t &= \theta_{t-1} + \Delta_t \pi \tanh(\omega_t), \\
    k_t &= \mathrm{Rot}(\theta_t) (\mathrm{norm}(B_t) + b_B), \\
    q_t &= \mathrm{Rot}(\theta_t) (\mathrm{norm}(C_t) + b_C), \\
    \alpha_t &= e^{\Delta_t A_t}, \quad \beta_t = (1 - \lambda_t) \Delta_t \alpha_t, \quad
      \gamma_t = \lambda_t \Delta_t, \\
    h_t &= \alpha_t h_{t-1} + \beta_t k_{t-1} u_{t-1}^\top + \gamma_t k_t u_t^\top, \\
    y_t &= h_t^\top q_t + D u_t, \\
    \text{out} &= W_\mathrm{out} (\mathrm{norm}(y \text{, if } \texttt{outproj\_norm})
      \odot \sigma(z)).
    \end{aligned}$$

    $\mathrm{Rot}(\theta)$ rotates pairs of the state's dimensions, as if the state were complex.
    The heads of a group share $B$ and $C$, and all heads share $\omega$. (The paper swaps the
    letters $x$ and $u$; here $x$ is the input, as for every layer.)

    These equations describe the SISO form. The MIMO form has `mimo_rank` = $R$ of $B$, $C$, $k$ and
    $q$, and

    $$\begin{aligned}
    v_{t,r} &= u_t \odot \texttt{mimo\_x}_r, \\
    h_t &= \alpha_t h_{t-1} + \beta_t \sum_r k_{t-1,r} v_{t-1,r}^\top
      + \gamma_t \sum_r k_{t,r} v_{t,r}^\top, \\
    \text{out} &= W_\mathrm{out} \sum_r \texttt{mimo\_o}_r \odot
      (h_t^\top q_{t,r} + D v_{t,r}) \odot \sigma(z_t \odot \texttt{mimo\_z}_r).
    \end{aligned}$$

    The MIMO form rotates the pairs $(i, i + N/2)$ and the SISO form the pairs $(2i, 2i + 1)$, as in
    the official kernels, so that a MIMO mixer of rank 1 differs from the SISO mixer.

    `in_proj` emits `[z, u, B, C, dt, A, trap, angles]`, in the order of the official checkpoints;
    `B` and `C` are ordered by rank, then by group. `D`, `dt_bias` and the whole state stay in
    float32 if the other parameters have a narrower dtype. `B_bias` and `C_bias` have the dtype of
    the weights; the official code trains them in float32, but applies weight decay to them and
    stores them like the weights.

    As in the official code, the rate of decay is $f(a) = 1 + a$ for $a \ge 0$ and $1 / (1 - a)$
    below ("heavy tail"). The paper, and releases of the official package up to 2.3.2, use $f$ =
    softplus (`A_activation`).

    This class differs from the official code in these points. `scan` continues from any state, by
    any number of tokens. `step` does not limit `ngroups` and `headdim`, and computes the same
    function as `scan`. The angle is always reduced to within half a turn of zero, whereas the
    official SISO kernel reduces it to between 0 and 1 turn and the MIMO kernel does not reduce it.
    Softplus is exact.

    Reference: Lahoti, Li, Chen, Wang, Bick, Kolter, Dao and Gu, *Mamba-3: Improved Sequence
    Modeling using State Space Principles* (2026); official `mamba_ssm.modules.mamba3.Mamba3`.
    """

    in_proj: AbstractLinear
    dt_bias: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    B_bias: Float[Array, "{self.nheads} {self.rank} {self.d_state}"]
    C_bias: Float[Array, "{self.nheads} {self.rank} {self.d_state}"]
    B_norm: eqx.nn.RMSNorm
    C_norm: eqx.nn.RMSNorm
    mimo_x: Float[Array, "{self.nheads} {self.rank} {self.headdim}"] | None
    mimo_z: Float[Array, "{self.nheads} {self.rank} {self.headdim}"] | None
    mimo_o: Float[Array, "{self.nheads} {self.rank} {self.headdim}"] | None
    D: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    norm: GatedRMSNorm | None
    out_proj: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    headdim: int = eqx.field(static=True)
    ngroups: int = eqx.field(static=True)
    mimo_rank: int | None = eqx.field(static=True)
    rope_fraction: float = eqx.field(static=True)
    A_activation: Literal["heavy_tail", "softplus"] = eqx.field(static=True)
    A_floor: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        d_inner: int | None = None,
        d_state: int = 128,
        headdim: int = 64,
        ngroups: int = 1,
        mimo_rank: int | None = None,
        rope_fraction: float = 0.5,
        A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        outproj_norm: bool = False,
        norm_eps: float = 1e-5,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is the official one.

        **Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_inner`: the number of channels of the state-space model; `2 * d_model` by default.
        - `d_state`: the number of hidden dimensions per channel.
        - `headdim`: the number of channels per head; it must divide `d_inner`.
        - `ngroups`: the number of groups of heads, each with its own `B` and `C`; it must divide
            the number of heads.
        - `mimo_rank`: the rank of the MIMO form (the official default is 4); `None` is the SISO
            form.
        - `rope_fraction`: the fraction of the `d_state` dimensions that are rotated: 0.5 or 1.
        - `A_activation`: the function $f$ above, `"heavy_tail"` or `"softplus"`.
        - `A_floor`: the smallest rate of decay, a positive number.
        - `dt_min`, `dt_max`, `dt_init_floor`: the initial step sizes are log-uniform in
            `[dt_min, dt_max]` and at least `dt_init_floor`.
        - `outproj_norm`: whether to normalise each head before the gate is applied (official
            `is_outproj_norm`).
        - `norm_eps`: a number between 0 and 1, added to the mean square in this norm and in the
            norms of `B` and `C`.
        - `residual_scale`: multiplies the initial weight of `out_proj`. In a model of `n` layers
            the official value is `1 / sqrt(n)`, which keeps the size of the residual stream
            independent of `n`.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, `headdim` does not divide
        `d_inner`, `ngroups` does not divide the number of heads, no pair of dimensions rotates, a
        range is empty, or an option is invalid.
        """
        rope_fraction, A_floor = to_python(rope_fraction), to_python(A_floor)
        norm_eps = to_python(norm_eps)
        d_inner = check_mamba3(
            d_model=d_model,
            d_inner=d_inner,
            d_state=d_state,
            headdim=headdim,
            ngroups=ngroups,
            mimo_rank=mimo_rank,
            rope_fraction=rope_fraction,
            A_activation=A_activation,
            A_floor=A_floor,
            outproj_norm=outproj_norm,
            norm_eps=norm_eps,
        )
        check_dt(dt_min, dt_max, dt_init_floor)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        wide = at_least_float32(dtype)
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.headdim = headdim
        self.ngroups = ngroups
        self.mimo_rank = mimo_rank
        self.rope_fraction = float(rope_fraction)
        self.A_activation = A_activation
        self.A_floor = float(A_floor)
        in_key, dt_key, out_key = jr.split(key, 3)
        self.in_proj = Linear(d_model, sum(self._sizes), use_bias=False, dtype=dtype, key=in_key)
        self.dt_bias = init_dt_bias(
            dt_key,
            (self.nheads,),
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dtype=wide,
        )
        self.B_bias = jnp.ones((self.nheads, self.rank, d_state), dtype)
        self.C_bias = jnp.ones((self.nheads, self.rank, d_state), dtype)
        self.B_norm = eqx.nn.RMSNorm(d_state, norm_eps, use_bias=False, dtype=dtype)
        self.C_norm = eqx.nn.RMSNorm(d_state, norm_eps, use_bias=False, dtype=dtype)
        self.mimo_x = self.mimo_z = self.mimo_o = None
        if mimo_rank is not None:
            shape = (self.nheads, mimo_rank, headdim)
            self.mimo_x = jnp.full(shape, 1 / mimo_rank, dtype)
            self.mimo_z = jnp.ones(shape, dtype)
            self.mimo_o = jnp.full(shape, 1 / mimo_rank, dtype)
        self.D = jnp.ones(self.nheads, wide)
        self.norm = None
        if outproj_norm:
            self.norm = GatedRMSNorm(
                d_inner, ngroups=self.nheads, eps=norm_eps, norm_before_gate=True, dtype=dtype
            )
        self.out_proj = Linear(
            d_inner, d_model, use_bias=False, dtype=dtype, scale=residual_scale, key=out_key
        )

    @property
    def nheads(self) -> int:
        """The number of heads, `d_inner / headdim`."""
        return self.d_inner // self.headdim

    @property
    def rank(self) -> int:
        """The rank of the MIMO form, and 1 in the SISO form."""
        return 1 if self.mimo_rank is None else self.mimo_rank

    @property
    def pairs(self) -> int:
        """The number of rotated pairs of dimensions."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def _sizes(self) -> list[int]:
        """The sizes of `z, u, B, C, dt, A, trap, angles` in the output of `in_proj`."""
        size_of_B = self.rank * self.ngroups * self.d_state
        return [self.d_inner] * 2 + [size_of_B] * 2 + [self.nheads] * 3 + [self.pairs]

    def init_state(self, *, max_len: int | None = None) -> Mamba3State:
        """Returns zeros. `max_len` is ignored."""
        dtype = at_least_float32(self.in_proj.dtype, self.dt_bias)
        return Mamba3State(
            angle=jnp.zeros((self.nheads, self.pairs), dtype),
            ssm=jnp.zeros((self.nheads, self.headdim, self.d_state), dtype),
            k=jnp.zeros((self.rank, self.nheads, self.d_state), dtype),
            v=jnp.zeros((self.nheads, self.headdim), dtype),
        )

    @jax.named_scope("mamba_eqx.Mamba3.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Mamba3State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], Mamba3State]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("Mamba3", self.d_model, x, reset, length)
        state = checked_state(self, state)
        projected = self._project(x)
        y, after = ops.mamba3(
            projected.u,
            projected.dt,
            projected.A,
            projected.B,
            projected.C,
            self.D,
            trap=projected.trap,
            angles=projected.angles,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            interleaved=self.mimo_rank is None,
            state=(state.angle, state.ssm, state.k, state.v),
            reset=reset,
            length=length,
        )
        return self._emit(y, projected.z).astype(x.dtype), Mamba3State(*after)

    @jax.named_scope("mamba_eqx.Mamba3.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: Mamba3State
    ) -> tuple[Float[Array, " {self.d_model}"], Mamba3State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Mamba3", self.d_model, x)
        state = checked_state(self, state)
        projected = self._project(x)
        y, after = ops.mamba3_step(
            projected.u,
            projected.dt,
            projected.A,
            projected.B,
            projected.C,
            self.D,
            trap=projected.trap,
            angles=projected.angles,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            interleaved=self.mimo_rank is None,
            state=(state.angle, state.ssm, state.k, state.v),
        )
        return self._emit(y, projected.z).astype(x.dtype), Mamba3State(*after)

    # The methods below accept one token or a sequence of tokens.

    def _project(self, x: Float[Array, "*seq {self.d_model}"]) -> _Projected:
        projected = self.in_proj(x)
        ends = [sum(self._sizes[:i]) for i in range(1, len(self._sizes))]
        z, u, B, C, dt, a, trap, angles = jnp.split(projected, ends, axis=-1)
        z, u = (t.reshape(*t.shape[:-1], self.nheads, self.headdim) for t in (z, u))
        shape = (*x.shape[:-1], self.rank, self.ngroups, self.d_state)
        wide = self.dt_bias.dtype
        B, C, dt, a, trap, angles = (t.astype(wide) for t in (B, C, dt, a, trap, angles))
        return _Projected(
            z=z,
            u=u,
            dt=jax.nn.softplus(dt + self.dt_bias),
            A=-jnp.maximum(_rate(a, self.A_activation), self.A_floor),
            B=_over_last_axis(self.B_norm, B.reshape(shape)),
            C=_over_last_axis(self.C_norm, C.reshape(shape)),
            trap=jax.nn.sigmoid(trap),
            angles=math.pi * jnp.tanh(angles),
        )

    def _emit(
        self,
        y: Float[Array, "*seq {self.rank} {self.nheads} {self.headdim}"],
        z: Float[Array, "*seq {self.nheads} {self.headdim}"],
    ) -> Float[Array, "*seq {self.d_model}"]:
        z = z[..., None, :, :]
        if self.mimo_z is not None:
            z = z * self.mimo_z.swapaxes(0, 1)
        if self.norm is None:
            y = y * jax.nn.silu(z)
        else:
            flat = (*y.shape[:-2], self.d_inner)
            y = self.norm(y.reshape(flat), z.reshape(flat)).reshape(y.shape)
        if self.mimo_o is not None:
            y = y * self.mimo_o.swapaxes(0, 1)
        # `jnp.sum` over an axis would compile to scalar code; a sum of arrays fuses with the
        # products.
        total = sum(y[..., r, :, :] for r in range(1, self.rank)) + y[..., 0, :, :]
        return self.out_proj(total.reshape(*total.shape[:-2], self.d_inner))


def _rate(
    a: Float[Array, "*shape"], activation: Literal["heavy_tail", "softplus"]
) -> Float[Array, "*shape"]:
    """Computes $f(a)$, the rate of decay before its floor."""
    if activation == "softplus":
        return jax.nn.softplus(a)
    # The derivative of the branch not taken would otherwise be NaN at its pole.
    return jnp.where(a >= 0, 1 + a, 1 / (1 - jnp.minimum(a, 0)))


def _over_last_axis(norm: eqx.nn.RMSNorm, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.vmap(norm)(x.reshape(-1, x.shape[-1])).reshape(x.shape)
