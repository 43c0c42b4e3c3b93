import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ... import ops
from ..._checks import check_positive
from ..._dtypes import at_least_float32, default_dtype
from .._arguments import check_sequence, check_token, checked_state
from .._initialisers import dt_bias
from .._linear import Linear
from .._norm import GatedRMSNorm
from .._protocol import AbstractSequenceLayer
from .._recurrence_parameters import RECURRENCE
from ._validation import check_A, check_dt, check_heads, check_rope_fraction


class Mamba3State(eqx.Module):
    """What `Mamba3` remembers: the angles by which its hidden state has turned (modulo a turn), the
    hidden state, and the last token's key and value."""

    angle: Float[Array, "nheads pairs"]
    ssm: Float[Array, "nheads headdim d_state"]
    k: Float[Array, "rank nheads d_state"]
    v: Float[Array, "nheads headdim"]


class _Projected(NamedTuple):
    """What `in_proj` says of one token, or of a sequence of them."""

    z: Float[Array, "*seq nheads headdim"]
    x: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    A: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq rank ngroups d_state"]
    C: Float[Array, "*seq rank ngroups d_state"]
    trap: Float[Array, "*seq nheads"]
    angles: Float[Array, "*seq pairs"]


class Mamba3(AbstractSequenceLayer[Mamba3State]):
    r"""The Mamba-3 mixer: a gated, selective state-space model whose hidden state turns, with a
    trapezoidal rule in place of a convolution.

    With $\sigma$ = SiLU, and for every head, with $P$ = `headdim` channels and $N$ = `d_state`,

    $$\begin{aligned}
    z, x, B, C, \delta, a, \tau, \omega &= W_{in} u, &
      \Delta &= \mathrm{softplus}(\delta + b_{dt}), \quad A = -\max(f(a), \texttt{A\_floor}), \quad
      \lambda = \mathrm{sigmoid}(\tau), \\
    \theta_t &= \theta_{t-1} + \Delta_t \pi \tanh(\omega_t), &
      k_t &= \mathrm{Rot}(\theta_t) (\mathrm{norm}(B_t) + b_B), \quad
      q_t = \mathrm{Rot}(\theta_t) (\mathrm{norm}(C_t) + b_C), \\
    h_t &= \alpha_t h_{t-1} + \beta_t k_{t-1} x_{t-1}^\top + \gamma_t k_t x_t^\top, &
      \alpha_t &= e^{\Delta_t A_t}, \quad \beta_t = (1 - \lambda_t) \Delta_t \alpha_t, \quad
      \gamma_t = \lambda_t \Delta_t, \\
    y_t &= h_t^\top q_t + D x_t, &
      \text{out} &= W_{out} (\mathrm{norm}(y \text{, if } \texttt{outproj\_norm}) \odot \sigma(z)).
    \end{aligned}$$

    $\mathrm{Rot}(\theta)$ turns pairs of the state's dimensions, as if the state were complex. $B$
    and $C$ are shared by the heads of a group, $\omega$ by all heads.

    That is the SISO form. The MIMO form has `mimo_rank` = $R$ of $B$, $C$, $k$ and $q$, and

    $$h_t = \alpha_t h_{t-1} + \beta_t \sum_r k_{t-1,r} v_{t-1,r}^\top
      + \gamma_t \sum_r k_{t,r} v_{t,r}^\top, \quad v_{t,r} = x_t \odot \texttt{mimo\_x}_r, \quad
      \text{out} = W_{out} \sum_r \texttt{mimo\_o}_r \odot
      (h_t^\top q_{t,r} + D v_{t,r}) \odot \sigma(z_t \odot \texttt{mimo\_z}_r).$$

    Its pairs are $(i, i + N/2)$ in place of $(2i, 2i + 1)$, as in the official kernels, so that a
    MIMO mixer of rank 1 is another model than the SISO one.

    `in_proj` emits `[z, x, B, C, dt, A, trap, angles]`, in the order of the official checkpoints;
    `B` and `C` are by rank, then by group. `D`, `dt_bias`, and all of the state stay in float32
    below that precision. `B_bias` and `C_bias`, which upstream trains in float32 too but decays
    and stores as the other weights, have the dtype of the weights here.

    What differs from the paper is what differs in the official code: the rate of decay is
    $f(a) = 1 + a$ for $a \ge 0$ and $1 / (1 - a)$ below ("heavy tail"), where the paper, and
    releases of the official package up to 2.3.2, have $f$ = softplus (`A_activation`). What differs
    from the official code: `scan` goes on from any state, by any number of tokens; `step` has no
    limits on `ngroups` and `headdim`, and is the same function as `scan`; the angle is reduced to
    within half a turn of zero everywhere, where the official SISO kernel has 0 to 1 turn, and the
    MIMO one does not reduce it; and softplus is exact.

    Reference: Lahoti, Li, Chen, Wang, Bick, Kolter, Dao and Gu, *Mamba-3: Improved Sequence
    Modeling using State Space Principles* (2026); official `mamba_ssm.modules.mamba3.Mamba3`.
    """

    in_proj: Linear
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
    out_proj: Linear
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

        - `d_model`: features of the input and the output.
        - `d_inner`: channels of the state-space model; `2 * d_model` by default.
        - `d_state`: hidden dimensions per channel.
        - `headdim`: channels per head; it must divide `d_inner`.
        - `ngroups`: groups of heads, each with its own `B` and `C`; it must divide the number of
            heads.
        - `mimo_rank`: the rank of the MIMO form, upstream 4; `None` is the SISO form.
        - `rope_fraction`: the fraction of the `d_state` dimensions that are turned: 0.5 or 1.
        - `A_activation`: as above.
        - `A_floor`: the rate of decay is at least this.
        - `dt_min`, `dt_max`, `dt_init_floor`: the initial step sizes are log-uniform in
            `[dt_min, dt_max]` and at least `dt_init_floor`.
        - `outproj_norm`: whether there is a norm, over each head, in front of the gate (upstream
            `is_outproj_norm`).
        - `norm_eps`: added to the mean square in that norm, and in those of `B` and `C`.
        - `residual_scale`: multiplies the initial weight of `out_proj`. In a model of `n` layers
            the official value is `1 / sqrt(n)`, which keeps the residual stream at the same size.
        - `dtype`: of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: for the initial parameters.

        **Raises:** `ValueError` for a size that is not a positive integer or does not divide what
        it has to, an empty range, or an unknown option.
        """
        check_positive("d_model", d_model)
        d_inner = 2 * d_model if d_inner is None else d_inner
        check_positive("d_inner", d_inner)
        check_positive("d_state", d_state)
        check_heads(d_inner, headdim, ngroups)
        if mimo_rank is not None:
            check_positive("mimo_rank", mimo_rank)
        check_rope_fraction(rope_fraction, d_state)
        check_A(A_activation, A_floor)
        check_dt(dt_min, dt_max, dt_init_floor)
        if not norm_eps > 0:
            raise ValueError(f"`norm_eps` must be positive, but got norm_eps={norm_eps}.")
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
        self.dt_bias = dt_bias(
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
        return self.d_inner // self.headdim

    @property
    def rank(self) -> int:
        """`mimo_rank`, and 1 in the SISO form."""
        return 1 if self.mimo_rank is None else self.mimo_rank

    @property
    def pairs(self) -> int:
        """How many pairs of dimensions are turned."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def _sizes(self) -> list[int]:
        """Of `z, x, B, C, dt, A, trap, angles`."""
        of_B = self.rank * self.ngroups * self.d_state
        return [self.d_inner] * 2 + [of_B] * 2 + [self.nheads] * 3 + [self.pairs]

    def init_state(self, *, max_len: int | None = None) -> Mamba3State:
        """Zeros. `max_len` is ignored."""
        dtype = at_least_float32(self.in_proj.weight, self.dt_bias)
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
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], Mamba3State]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        check_sequence("Mamba3", self.d_model, x, reset, length)
        state = checked_state(self, state)
        z, u, dt, A, B, C, trap, angles = self._project(x)
        y, after = ops.mamba3(
            u,
            dt,
            A,
            B,
            C,
            self.D,
            trap=trap,
            angles=angles,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            interleaved=self.mimo_rank is None,
            state=(state.angle, state.ssm, state.k, state.v),
            reset=reset,
            length=length,
        )
        return self._emit(y, z).astype(x.dtype), Mamba3State(*after)

    @jax.named_scope("mamba_eqx.Mamba3.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: Mamba3State
    ) -> tuple[Float[Array, " {self.d_model}"], Mamba3State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Mamba3", self.d_model, x)
        state = checked_state(self, state)
        z, u, dt, A, B, C, trap, angles = self._project(x)
        y, after = ops.mamba3_step(
            u,
            dt,
            A,
            B,
            C,
            self.D,
            trap=trap,
            angles=angles,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            interleaved=self.mimo_rank is None,
            state=(state.angle, state.ssm, state.k, state.v),
        )
        return self._emit(y, z).astype(x.dtype), Mamba3State(*after)

    # Of one token or of a sequence: the axes in front do not matter.

    def _project(self, x: Float[Array, "*seq {self.d_model}"]) -> _Projected:
        everything = self.in_proj(x.astype(self.in_proj.weight.dtype))
        ends = [sum(self._sizes[:i]) for i in range(1, len(self._sizes))]
        z, u, B, C, dt, a, trap, angles = jnp.split(everything, ends, axis=-1)
        z, u = (t.reshape(*t.shape[:-1], self.nheads, self.headdim) for t in (z, u))
        shape = (*x.shape[:-1], self.rank, self.ngroups, self.d_state)
        wide = self.dt_bias.dtype
        B, C, dt, a, trap, angles = (t.astype(wide) for t in (B, C, dt, a, trap, angles))
        return _Projected(
            z=z,
            x=u,
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
        # A sum of arrays, which fuses with the products; over an axis it would be scalar code.
        total = sum(y[..., r, :, :] for r in range(1, self.rank)) + y[..., 0, :, :]
        return self.out_proj(total.reshape(*total.shape[:-2], self.d_inner))


def _rate(
    a: Float[Array, "*shape"], activation: Literal["heavy_tail", "softplus"]
) -> Float[Array, "*shape"]:
    if activation == "softplus":
        return jax.nn.softplus(a)
    # The branch not taken is kept away from its pole, where its derivative is not a number.
    return jnp.where(a >= 0, 1 + a, 1 / (1 - jnp.minimum(a, 0)))


def _over_last_axis(norm: eqx.nn.RMSNorm, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.vmap(norm)(x.reshape(-1, x.shape[-1])).reshape(x.shape)
