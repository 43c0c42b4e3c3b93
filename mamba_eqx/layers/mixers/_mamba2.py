import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ... import ops
from ..._checks import to_python
from ..._dtypes import at_least_float32, default_dtype
from .._arguments import check_token, checked_sequence, checked_state
from .._conv import CausalConv1d
from .._gate import gated, silu
from .._initialisers import init_heads
from .._linear import AbstractLinear, Linear
from .._norm import GatedRMSNorm
from .._protocol import AbstractSequenceLayer, Length, Reset
from .._recurrence_parameters import RECURRENCE
from ._validation import check_A_init_range, check_dt, check_mamba2


class Mamba2State(eqx.Module):
    """The state of [`mamba_eqx.Mamba2`][].

    - `conv`: the last `d_conv - 1` inputs of the convolution, oldest first.
    - `ssm`: the hidden state, at least in float32. The heads, and within them the channels, are its
        last axes, so that one matrix product multiplies `B` or `C` with all heads of a group.
        ([`mamba_eqx.Mamba1State`][] and [`mamba_eqx.Mamba3State`][] order their axes differently,
        each as its own scan needs.)
    """

    conv: Float[Array, "lag channels"]
    ssm: Float[Array, "d_state nheads headdim"]


class _Projected(NamedTuple):
    """The output of `in_proj`, split."""

    mlp: Float[Array, "*seq d_mlp"]
    z: Float[Array, "*seq d_ssm"]
    uBC: Float[Array, "*seq channels"]
    dt: Float[Array, "*seq nheads"]


class _Selected(NamedTuple):
    """The inputs of the state-space model, except for `A` and `D`."""

    u: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq ngroups d_state"]
    C: Float[Array, "*seq ngroups d_state"]


class Mamba2Selection(NamedTuple):
    """What [`mamba_eqx.Mamba2`][] computes from its input before the recurrence.

    - `u`, `dt`, `B`, `C`: the arguments of [`mamba_eqx.ops.ssd`][], of the shapes
        `(seq, nheads, headdim)`, `(seq, nheads)`, and `(seq, ngroups, d_state)`, twice.
    - `z`: the gate, shape `(seq, d_ssm)`.
    - `mlp`: the gate and the values of the MLP, shape `(seq, 2 * (d_inner - d_ssm))`.
    - `conv`: the state of the convolution after the last real token, shape
        `(d_conv - 1, channels)`.
    """

    u: Float[Array, "seq nheads headdim"]
    dt: Float[Array, "seq nheads"]
    B: Float[Array, "seq ngroups d_state"]
    C: Float[Array, "seq ngroups d_state"]
    z: Float[Array, "seq d_ssm"]
    mlp: Float[Array, "seq d_mlp"]
    conv: Float[Array, "lag channels"]


class Mamba2(AbstractSequenceLayer[Mamba2State]):
    r"""The Mamba-2 mixer: a gated, selective state-space model with one rate of decay per head.

    With $\sigma$ = SiLU, and for every head, with $P$ = `headdim` channels and $N$ = `d_state`,

    $$\begin{aligned}
    z, u, B, C, \delta &= \mu \odot (W_\mathrm{in} x), \\
    [u, B, C] &\leftarrow \sigma(\mathrm{conv1d}([u, B, C])), \\
    \Delta &= \mathrm{clip}(\mathrm{softplus}(\delta + b_\mathrm{dt})), \\
    h_t &= \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t u_t^\top, \\
    y_t &= h_t^\top C_t + D \odot u_t, \\
    \text{out} &= W_\mathrm{out}\, \mathrm{norm}(y \odot \sigma(z)),
    \end{aligned}$$

    where $A = -\exp(\texttt{A\_log})$ is one number per head. (The paper swaps the letters $x$ and
    $u$; here $x$ is the input, as for every layer.) The heads of a group share $B$ and $C$, and the
    norm is over the channels of a group. The vector $\mu$ repeats the five numbers
    `ssm_multipliers`, one for each of $z$, $u$, $B$, $C$ and $\delta$, which are 1 except in models
    like Falcon-H1.

    The state-space model has `d_ssm` of the `d_inner` channels, by default all. The other channels
    form a gated MLP, $\sigma(z_0) \odot u_0$, whose output precedes the state-space model's
    in the input of `out_proj`.

    `in_proj` emits `[z0, u0, z, u, B, C, dt]`, in the order of the official checkpoints. `A_log`,
    `D`, `dt_bias` and the hidden state stay in float32 if the other parameters have a narrower
    dtype. `scan` and `step` both apply `dt_limit`; the `step` of the official module and that of
    transformers ignore it.

    Reference: Dao and Gu, *Transformers are SSMs: Generalized Models and Efficient Algorithms
    Through Structured State Space Duality* (2024), section 7; official
    `mamba_ssm.modules.mamba2.Mamba2`.
    """

    in_proj: AbstractLinear
    conv1d: CausalConv1d
    dt_bias: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    A_log: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    D: Float[Array, " {self.nheads}"] | Float[Array, "{self.nheads} {self.headdim}"] = eqx.field(
        metadata=RECURRENCE
    )
    norm: GatedRMSNorm | None
    out_proj: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_ssm: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    headdim: int = eqx.field(static=True)
    ngroups: int = eqx.field(static=True)
    D_has_hdim: bool = eqx.field(static=True)
    dt_limit: tuple[float, float] = eqx.field(static=True)
    ssm_multipliers: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        d_inner: int | None = None,
        d_ssm: int | None = None,
        d_state: int = 128,
        d_conv: int = 4,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        rms_norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        ssm_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is the official one.

        **Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_inner`: the number of channels between the projections; `2 * d_model` by default.
        - `d_ssm`: the number of channels of the state-space model, at most `d_inner`, which is the
            default. The other channels form a gated MLP.
        - `d_state`: the number of hidden dimensions per channel.
        - `d_conv`: the number of taps of the convolution.
        - `headdim`: the number of channels per head; it must divide `d_ssm`.
        - `ngroups`: the number of groups of heads, each with its own `B`, `C` and norm; it must
            divide the number of heads.
        - `A_init_range`: the range of the initial rates of decay `-A`, which are uniform in it.
        - `D_has_hdim`: whether the skip connection has one weight per channel, rather than per
            head.
        - `dt_min`, `dt_max`, `dt_init_floor`: the initial step sizes are log-uniform in
            `[dt_min, dt_max]` and at least `dt_init_floor`.
        - `dt_limit`: the smallest and the largest step size; others are clipped.
        - `bias`: whether `in_proj` and `out_proj` have a bias.
        - `conv_bias`: whether `conv1d` has a bias.
        - `rms_norm`: whether there is a norm before `out_proj` as well as the gate, rather than the
            gate alone.
        - `norm_before_gate`: whether to normalise before the gate is applied, rather than after.
        - `norm_eps`: a number between 0 and 1, added to the mean square in the norm.
        - `ssm_multipliers`: five positive numbers, which multiply the parts `z`, `u`, `B`, `C` and
            `dt` of the output of `in_proj`. The channels of the MLP are not multiplied.
        - `residual_scale`: multiplies the initial weight of `out_proj`. In a model of `n` layers
            the official value is `1 / sqrt(n)`, which keeps the size of the residual stream
            independent of `n`.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, `d_ssm` is larger than
        `d_inner`, `headdim` does not divide `d_ssm`, `ngroups` does not divide the number of heads,
        a range is empty, an option is invalid, or `norm_before_gate` is set without a norm.
        """
        dt_limit, norm_eps = to_python(dt_limit), to_python(norm_eps)
        ssm_multipliers = to_python(ssm_multipliers)
        d_inner, d_ssm = check_mamba2(
            d_model=d_model,
            d_inner=d_inner,
            d_ssm=d_ssm,
            d_state=d_state,
            d_conv=d_conv,
            headdim=headdim,
            ngroups=ngroups,
            D_has_hdim=D_has_hdim,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            rms_norm=rms_norm,
            norm_before_gate=norm_before_gate,
            norm_eps=norm_eps,
            ssm_multipliers=ssm_multipliers,
        )
        check_dt(dt_min, dt_max, dt_init_floor)
        check_A_init_range(A_init_range)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        wide = at_least_float32(dtype)
        nheads = d_ssm // headdim
        channels = d_ssm + 2 * ngroups * d_state
        in_key, conv_key, bias_key, A_key, out_key = jr.split(key, 5)
        self.in_proj = Linear(
            d_model,
            2 * (d_inner - d_ssm) + d_ssm + channels + nheads,
            use_bias=bias,
            dtype=dtype,
            key=in_key,
        )
        self.conv1d = CausalConv1d(channels, d_conv, use_bias=conv_bias, dtype=dtype, key=conv_key)
        self.dt_bias, self.A_log = init_heads(
            bias_key,
            A_key,
            nheads,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            A_init_range=A_init_range,
            dtype=wide,
        )
        self.D = jnp.ones((nheads, headdim) if D_has_hdim else nheads, wide)
        self.norm = None
        if rms_norm:
            self.norm = GatedRMSNorm(
                d_ssm,
                ngroups=ngroups,
                eps=norm_eps,
                norm_before_gate=norm_before_gate,
                dtype=dtype,
            )
        self.out_proj = Linear(
            d_inner, d_model, use_bias=bias, dtype=dtype, scale=residual_scale, key=out_key
        )
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_ssm = d_ssm
        self.d_state = d_state
        self.headdim = headdim
        self.ngroups = ngroups
        self.D_has_hdim = D_has_hdim
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.ssm_multipliers = tuple(map(float, ssm_multipliers))

    @property
    def nheads(self) -> int:
        """The number of heads, `d_ssm / headdim`."""
        return self.d_ssm // self.headdim

    @property
    def A(self) -> Float[Array, " {self.nheads}"]:
        """The negated rates of decay, `-exp(A_log)`."""
        return -jnp.exp(self.A_log)

    def init_state(self, *, max_len: int | None = None) -> Mamba2State:
        """Returns zeros. `max_len` is ignored."""
        ssm_dtype = at_least_float32(self.in_proj.dtype, self.A_log)
        return Mamba2State(
            conv=self.conv1d.init_state(),
            ssm=jnp.zeros((self.d_state, self.nheads, self.headdim), ssm_dtype),
        )

    @jax.named_scope("mamba_eqx.Mamba2.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Mamba2State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], Mamba2State]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        state = checked_state(self, state)
        u, dt, B, C, z, mlp, conv = self.select(x, state, reset=reset, length=length)
        y, ssm = ops.ssd(u, dt, self.A, B, C, self.D, state=state.ssm, reset=reset, length=length)
        return self._emit(y, z, mlp).astype(x.dtype), Mamba2State(conv, ssm)

    def select(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Mamba2State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Mamba2Selection:
        """Computes the inputs of the recurrence, as `scan` does.

        **Arguments:** as for `scan`.

        **Returns:**

        A [`mamba_eqx.layers.Mamba2Selection`][].

        **Raises:** `ValueError` as `scan` does.
        """
        x = checked_sequence("Mamba2", self.d_model, x, reset, length)
        state = checked_state(self, state)
        mlp, z, uBC, dt = self._project(x)
        uBC, conv = self.conv1d.scan(uBC, state.conv, reset=reset, length=length)
        return Mamba2Selection(*self._select(uBC, dt), z, mlp, conv)

    @jax.named_scope("mamba_eqx.Mamba2.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: Mamba2State
    ) -> tuple[Float[Array, " {self.d_model}"], Mamba2State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Mamba2", self.d_model, x)
        state = checked_state(self, state)
        mlp, z, uBC, dt = self._project(x)
        uBC, conv = self.conv1d.step(uBC, state.conv)
        u, dt, B, C = self._select(uBC, dt)
        y, ssm = ops.ssd_step(u, dt, self.A, B, C, self.D, state=state.ssm)
        return self._emit(y, z, mlp).astype(x.dtype), Mamba2State(conv, ssm)

    # The methods below accept one token or a sequence of tokens.

    def _project(self, x: Float[Array, "*seq {self.d_model}"]) -> _Projected:
        projected = self.in_proj(x)
        end_of_mlp = 2 * (self.d_inner - self.d_ssm)
        if set(self.ssm_multipliers) != {1}:
            groups = self.ngroups * self.d_state
            sizes = (end_of_mlp, self.d_ssm, self.d_ssm, groups, groups, self.nheads)
            multipliers = np.repeat((1.0, *self.ssm_multipliers), sizes)
            projected *= multipliers.astype(projected.dtype)
        ends = [end_of_mlp, end_of_mlp + self.d_ssm, projected.shape[-1] - self.nheads]
        return _Projected(*jnp.split(projected, ends, axis=-1))

    def _select(
        self, uBC: Float[Array, "*seq channels"], dt: Float[Array, "*seq {self.nheads}"]
    ) -> _Selected:
        ends = [self.d_ssm, self.d_ssm + self.ngroups * self.d_state]
        u, B, C = jnp.split(silu(uBC), ends, axis=-1)
        dt = jax.nn.softplus(dt.astype(self.dt_bias.dtype) + self.dt_bias)
        # The op returns the dtype of its input: `out_proj` rounds, once, what it reads.
        u = u.astype(at_least_float32(u, self.A_log))
        return _Selected(
            u=u.reshape(*u.shape[:-1], self.nheads, self.headdim),
            dt=jnp.clip(dt, *self.dt_limit),
            B=B.reshape(*B.shape[:-1], self.ngroups, self.d_state),
            C=C.reshape(*C.shape[:-1], self.ngroups, self.d_state),
        )

    def _emit(
        self,
        y: Float[Array, "*seq {self.nheads} {self.headdim}"],
        z: Float[Array, "*seq {self.d_ssm}"],
        mlp: Float[Array, "*seq d_mlp"],
    ) -> Float[Array, "*seq {self.d_model}"]:
        y = y.reshape(z.shape)
        y = gated(y, z) if self.norm is None else self.norm(y, z)
        if self.d_ssm < self.d_inner:
            gate, value = jnp.split(mlp, 2, axis=-1)
            y = jnp.concatenate([gated(value, gate), y], axis=-1)
        return self.out_proj(y)
