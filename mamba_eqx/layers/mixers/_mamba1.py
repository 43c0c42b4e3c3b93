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
from .._conv import CausalConv1d
from .._gate import gated, silu
from .._initialisers import init_dt_bias
from .._linear import AbstractLinear, Linear
from .._protocol import AbstractSequenceLayer, Length, Reset
from .._recurrence_parameters import RECURRENCE
from ._validation import check_dt, check_mamba1


class Mamba1State(eqx.Module):
    """The state of [`mamba_eqx.Mamba1`][].

    - `conv`: the last `d_conv - 1` inputs of the convolution, oldest first.
    - `ssm`: the hidden state, at least in float32. The channels are its last axis, so that every
        elementwise operation of the scan is a vector operation. ([`mamba_eqx.Mamba2State`][] and
        [`mamba_eqx.Mamba3State`][] order their axes differently, each as its own scan needs.)
    """

    conv: Float[Array, "lag d_inner"]
    ssm: Float[Array, "d_state d_inner"]


class Mamba1Selection(NamedTuple):
    """What [`mamba_eqx.Mamba1`][] computes from its input before the recurrence.

    - `u`, `dt`, `B`, `C`: the arguments of [`mamba_eqx.ops.selective_scan`][], of the shapes
        `(seq, d_inner)`, twice, and `(seq, d_state)`, twice.
    - `z`: the gate, shape `(seq, d_inner)`.
    - `conv`: the state of the convolution after the last real token, shape `(d_conv - 1, d_inner)`.
    """

    u: Float[Array, "seq d_inner"]
    dt: Float[Array, "seq d_inner"]
    B: Float[Array, "seq d_state"]
    C: Float[Array, "seq d_state"]
    z: Float[Array, "seq d_inner"]
    conv: Float[Array, "lag d_inner"]


class Mamba1(AbstractSequenceLayer[Mamba1State]):
    r"""The Mamba mixer: a gated, selective state-space model.

    With $\sigma$ = SiLU, $E$ = `d_inner` channels and the state size $N$ = `d_state`,

    $$\begin{aligned}
    u, z &= W_\mathrm{in} x, \\
    u &\leftarrow \sigma(\mathrm{conv1d}(u)), \\
    \delta, B, C &= W_x u, \\
    \Delta &= \mathrm{softplus}(W_\mathrm{dt} \delta + b_\mathrm{dt}), \\
    h_t &= \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t u_t, \\
    y_t &= C_t^\top h_t + D u_t, \\
    \text{out} &= W_\mathrm{out} (y \odot \sigma(z)),
    \end{aligned}$$

    where $A = -\exp(\texttt{A\_log})$. (The paper swaps the letters $x$ and $u$; here $x$ is the
    input, as for every layer.) The model is selective, because $B$, $C$ and $\Delta$ depend on the
    input. The input is discretised by Euler's rule, as in the official code, not by the
    zero-order hold of the paper's equation 4.

    With `select_norm`, a separate root-mean-square norm is applied to each of $\delta$, $B$ and
    $C$, as in Jamba (`"weighted"`) and in Falcon-Mamba (`"weightless"`). The official Mamba has no
    such norm.

    `in_proj` emits `[u, z]` and `x_proj` emits `[dt, B, C]`, in the order of the official
    checkpoints. `A_log`, `D`, `dt_bias` and the hidden state stay in float32 if the other
    parameters have a narrower dtype. Official checkpoints call `dt_bias` `dt_proj.bias`.

    Reference: Gu and Dao, *Mamba: Linear-Time Sequence Modeling with Selective State Spaces*
    (2023), section 3; official `mamba_ssm.modules.mamba_simple.Mamba`.
    """

    in_proj: AbstractLinear
    conv1d: CausalConv1d
    x_proj: AbstractLinear
    dt_norm: eqx.nn.RMSNorm | None
    B_norm: eqx.nn.RMSNorm | None
    C_norm: eqx.nn.RMSNorm | None
    dt_proj: AbstractLinear
    dt_bias: Float[Array, " {self.d_inner}"] = eqx.field(metadata=RECURRENCE)
    A_log: Float[Array, "{self.d_inner} {self.d_state}"] = eqx.field(metadata=RECURRENCE)
    D: Float[Array, " {self.d_inner}"] = eqx.field(metadata=RECURRENCE)
    out_proj: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    dt_rank: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        d_inner: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        select_norm: Literal["weighted", "weightless"] | None = None,
        select_norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is the official one.

        **Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_inner`: the number of channels of the state-space model; `2 * d_model` by default.
        - `d_state`: the number of hidden dimensions per channel.
        - `d_conv`: the number of taps of the convolution.
        - `dt_rank`: the rank of the map to the step sizes; `ceil(d_model / 16)` by default.
        - `dt_min`, `dt_max`, `dt_init_floor`: the initial step sizes are log-uniform in
            `[dt_min, dt_max]` and at least `dt_init_floor`.
        - `bias`: whether `in_proj` and `out_proj` have a bias.
        - `conv_bias`: whether `conv1d` has a bias.
        - `select_norm`: whether to normalise `dt`, `B` and `C` (see above), with weights or
            without.
        - `select_norm_eps`: a number between 0 and 1, added to the mean square in these norms.
        - `residual_scale`: multiplies the initial weight of `out_proj`. In a model of `n` layers
            the official value is `1 / sqrt(n)`, which keeps the size of the residual stream
            independent of `n`.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, the range of step sizes is
        empty, or an option is invalid.
        """
        select_norm_eps = to_python(select_norm_eps)
        d_inner, dt_rank = check_mamba1(
            d_model=d_model,
            d_inner=d_inner,
            d_state=d_state,
            d_conv=d_conv,
            dt_rank=dt_rank,
            bias=bias,
            conv_bias=conv_bias,
            select_norm=select_norm,
            select_norm_eps=select_norm_eps,
        )
        check_dt(dt_min, dt_max, dt_init_floor)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        wide = at_least_float32(dtype)
        in_key, conv_key, x_key, dt_key, bias_key, out_key = jr.split(key, 6)
        self.in_proj = Linear(d_model, 2 * d_inner, use_bias=bias, dtype=dtype, key=in_key)
        self.conv1d = CausalConv1d(d_inner, d_conv, use_bias=conv_bias, dtype=dtype, key=conv_key)
        self.x_proj = Linear(d_inner, dt_rank + 2 * d_state, use_bias=False, dtype=dtype, key=x_key)
        self.dt_norm = self.B_norm = self.C_norm = None
        if select_norm is not None:
            self.dt_norm, self.B_norm, self.C_norm = (
                eqx.nn.RMSNorm(
                    size,
                    select_norm_eps,
                    use_weight=select_norm == "weighted",
                    use_bias=False,
                    dtype=dtype,
                )
                for size in (dt_rank, d_state, d_state)
            )
        self.dt_proj = Linear(dt_rank, d_inner, use_bias=False, dtype=dtype, key=dt_key)
        self.dt_bias = init_dt_bias(
            bias_key,
            (d_inner,),
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dtype=wide,
        )
        self.A_log = jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=wide)), (d_inner, 1))
        self.D = jnp.ones(d_inner, wide)
        self.out_proj = Linear(
            d_inner, d_model, use_bias=bias, dtype=dtype, scale=residual_scale, key=out_key
        )
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.dt_rank = dt_rank

    @property
    def A(self) -> Float[Array, "{self.d_inner} {self.d_state}"]:
        """The negated rates of decay, `-exp(A_log)`."""
        return -jnp.exp(self.A_log)

    def init_state(self, *, max_len: int | None = None) -> Mamba1State:
        """Returns zeros. `max_len` is ignored."""
        ssm_dtype = at_least_float32(self.in_proj.dtype, self.A_log)
        return Mamba1State(
            conv=self.conv1d.init_state(),
            ssm=jnp.zeros((self.d_state, self.d_inner), ssm_dtype),
        )

    @jax.named_scope("mamba_eqx.Mamba1.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Mamba1State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], Mamba1State]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        state = checked_state(self, state)
        u, dt, B, C, z, conv = self.select(x, state, reset=reset, length=length)
        y, ssm = ops.selective_scan(
            u, dt, self.A, B, C, self.D, state=state.ssm, reset=reset, length=length
        )
        out = self.out_proj(gated(y, z))
        return out.astype(x.dtype), Mamba1State(conv, ssm)

    def select(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Mamba1State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Mamba1Selection:
        """Computes the inputs of the recurrence, as `scan` does.

        **Arguments:** as for `scan`.

        **Returns:**

        A [`mamba_eqx.layers.Mamba1Selection`][].

        **Raises:** `ValueError` as `scan` does.
        """
        x = checked_sequence("Mamba1", self.d_model, x, reset, length)
        state = checked_state(self, state)
        u, z = self._project(x)
        u, conv = self.conv1d.scan(u, state.conv, reset=reset, length=length)
        u = silu(u)
        dt, B, C = self._select(u)
        # The op returns the dtype of its input: `out_proj` rounds, once, what it reads.
        return Mamba1Selection(u.astype(state.ssm.dtype), dt, B, C, z, conv)

    @jax.named_scope("mamba_eqx.Mamba1.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: Mamba1State
    ) -> tuple[Float[Array, " {self.d_model}"], Mamba1State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Mamba1", self.d_model, x)
        state = checked_state(self, state)
        u, z = self._project(x)
        u, conv = self.conv1d.step(u, state.conv)
        u = silu(u)
        dt, B, C = self._select(u)
        u = u.astype(state.ssm.dtype)
        y, ssm = ops.selective_scan_step(u, dt, self.A, B, C, self.D, state=state.ssm)
        out = self.out_proj(gated(y, z))
        return out.astype(x.dtype), Mamba1State(conv, ssm)

    # The methods below accept one token or a sequence of tokens.

    def _project(
        self, x: Float[Array, "*seq {self.d_model}"]
    ) -> tuple[Float[Array, "*seq {self.d_inner}"], Float[Array, "*seq {self.d_inner}"]]:
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        return u, z

    def _select(
        self, u: Float[Array, "*seq {self.d_inner}"]
    ) -> tuple[
        Float[Array, "*seq {self.d_inner}"],
        Float[Array, "*seq {self.d_state}"],
        Float[Array, "*seq {self.d_state}"],
    ]:
        ends = [self.dt_rank, self.dt_rank + self.d_state]
        dt, B, C = jnp.split(self.x_proj(u), ends, axis=-1)
        dt, B, C = _normed(self.dt_norm, dt), _normed(self.B_norm, B), _normed(self.C_norm, C)
        dt = self.dt_proj(dt, dtype=self.dt_bias.dtype) + self.dt_bias
        return jax.nn.softplus(dt), B, C


def _normed(norm: eqx.nn.RMSNorm | None, x: Float[Array, "*seq size"]) -> Float[Array, "*seq size"]:
    if norm is None:
        return x
    return norm(x) if x.ndim == 1 else jax.vmap(norm)(x)
