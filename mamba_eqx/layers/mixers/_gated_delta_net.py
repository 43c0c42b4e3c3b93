from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ... import ops
from ..._checks import to_python
from ..._dtypes import at_least_float32, default_dtype
from .._arguments import check_token, checked_sequence, checked_state
from .._conv import CausalConv1d
from .._initialisers import init_heads
from .._linear import AbstractLinear, Linear
from .._norm import GatedRMSNorm
from .._protocol import AbstractSequenceLayer, Length, Reset
from .._recurrence_parameters import RECURRENCE
from ._validation import check_A_init_range, check_dt, check_gated_delta_net


class GatedDeltaNetState(eqx.Module):
    """The state of [`mamba_eqx.GatedDeltaNet`][].

    - `conv`: the last `d_conv - 1` inputs of the convolution, oldest first.
    - `ssm`: the hidden state, a map from keys to values for each head, at least in float32.
    """

    conv: Float[Array, "lag channels"]
    ssm: Float[Array, "nheads d_state headdim"]


class _Projected(NamedTuple):
    """The output of `in_proj`, split."""

    qkv: Float[Array, "*seq channels"]
    z: Float[Array, "*seq d_inner"]
    beta: Float[Array, "*seq nheads"]
    dt: Float[Array, "*seq nheads"]


class _Selected(NamedTuple):
    """The inputs of the gated delta rule."""

    q: Float[Array, "*seq ngroups d_state"]
    k: Float[Array, "*seq ngroups d_state"]
    v: Float[Array, "*seq nheads headdim"]
    log_decay: Float[Array, "*seq nheads"]
    beta: Float[Array, "*seq nheads"]


class GatedDeltaNet(AbstractSequenceLayer[GatedDeltaNetState]):
    r"""The Gated DeltaNet mixer: a gated layer whose hidden state is a map from keys to values that
    decays, and that each token corrects.

    With $\sigma$ = SiLU, and for every head, with $P$ = `headdim` channels and $N$ = `d_state`,

    $$\begin{aligned}
    q, k, v, z, b, \delta &= W_\mathrm{in} x, \\
    [q, k, v] &\leftarrow \sigma(\mathrm{conv1d}([q, k, v])), \\
    q &\leftarrow q / (\|q\| \sqrt N), \quad k \leftarrow k / \|k\|, \\
    \beta &= \mathrm{sigmoid}(b), \quad \Delta = \mathrm{softplus}(\delta + b_\mathrm{dt}), \\
    \tilde S_t &= \exp(\Delta_t A)\, S_{t-1}, \\
    S_t &= \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top, \\
    y_t &= S_t^\top q_t, \\
    \text{out} &= W_\mathrm{out} (\mathrm{norm}(y) \odot \sigma(z)),
    \end{aligned}$$

    where $A = -\exp(\texttt{A\_log})$ is one number per head. The heads of a group share $q$ and
    $k$. The norm is over the channels of a head, with weights that all heads share. Mamba-2 is the
    same without the term $\tilde S_t^\top k_t$: it adds to the state, and cannot replace what is
    stored for a key.

    `in_proj` emits `[q, k, v, z, b, dt]`. (Qwen3-Next orders the same rows by groups, and keeps
    `[b, dt]` in a second projection.) `A_log`, `dt_bias` and the hidden state stay in float32 if
    the other parameters have a narrower dtype.

    Reference: Yang, Kautz and Hatamizadeh, *Gated Delta Networks: Improving Mamba2 with Delta Rule*
    (2025); `Qwen3NextGatedDeltaNet` of transformers.
    """

    in_proj: AbstractLinear
    conv1d: CausalConv1d
    dt_bias: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    A_log: Float[Array, " {self.nheads}"] = eqx.field(metadata=RECURRENCE)
    norm: GatedRMSNorm
    out_proj: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    headdim: int = eqx.field(static=True)
    ngroups: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        d_inner: int | None = None,
        d_state: int = 128,
        d_conv: int = 4,
        headdim: int = 128,
        ngroups: int | None = None,
        A_init_range: tuple[float, float] = (0.01, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is that of the official code, flash-linear-attention. (transformers
        starts with `dt_bias` of one.)

        **Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_inner`: the number of channels of the values; `2 * d_model` by default.
        - `d_state`: the number of dimensions of a query or a key.
        - `d_conv`: the number of taps of the convolution.
        - `headdim`: the number of channels per head; it must divide `d_inner`.
        - `ngroups`: the number of groups of heads, each with its own queries and keys; it must
            divide the number of heads, which is the default.
        - `A_init_range`: the range of the initial rates of decay `-A`, which are uniform in it.
        - `dt_min`, `dt_max`, `dt_init_floor`: the initial step sizes are log-uniform in
            `[dt_min, dt_max]` and at least `dt_init_floor`.
        - `norm_eps`: a number between 0 and 1, added to the mean square in the norm.
        - `residual_scale`: multiplies the initial weight of `out_proj`; see [`mamba_eqx.Mamba2`][].
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, `headdim` does not divide
        `d_inner`, `ngroups` does not divide the number of heads, a range is empty, or `norm_eps` is
        not between 0 and 1.
        """
        norm_eps = to_python(norm_eps)
        d_inner, ngroups = check_gated_delta_net(
            d_model=d_model,
            d_inner=d_inner,
            d_state=d_state,
            d_conv=d_conv,
            headdim=headdim,
            ngroups=ngroups,
            norm_eps=norm_eps,
        )
        check_dt(dt_min, dt_max, dt_init_floor)
        check_A_init_range(A_init_range)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        wide = at_least_float32(dtype)
        nheads = d_inner // headdim
        channels = 2 * ngroups * d_state + d_inner
        in_key, conv_key, bias_key, A_key, out_key = jr.split(key, 5)
        self.in_proj = Linear(
            d_model, channels + d_inner + 2 * nheads, use_bias=False, dtype=dtype, key=in_key
        )
        self.conv1d = CausalConv1d(channels, d_conv, use_bias=False, dtype=dtype, key=conv_key)
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
        self.norm = GatedRMSNorm(headdim, eps=norm_eps, norm_before_gate=True, dtype=dtype)
        self.out_proj = Linear(
            d_inner, d_model, use_bias=False, dtype=dtype, scale=residual_scale, key=out_key
        )
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.headdim = headdim
        self.ngroups = ngroups

    @property
    def nheads(self) -> int:
        """The number of heads, `d_inner / headdim`."""
        return self.d_inner // self.headdim

    @property
    def A(self) -> Float[Array, " {self.nheads}"]:
        """The negated rates of decay, `-exp(A_log)`."""
        return -jnp.exp(self.A_log)

    def init_state(self, *, max_len: int | None = None) -> GatedDeltaNetState:
        """Returns zeros. `max_len` is ignored."""
        ssm_dtype = at_least_float32(self.in_proj.dtype, self.A_log)
        return GatedDeltaNetState(
            conv=self.conv1d.init_state(),
            ssm=jnp.zeros((self.nheads, self.d_state, self.headdim), ssm_dtype),
        )

    @jax.named_scope("mamba_eqx.GatedDeltaNet.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: GatedDeltaNetState | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], GatedDeltaNetState]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("GatedDeltaNet", self.d_model, x, reset, length)
        state = checked_state(self, state)
        projected = self._project(x)
        qkv, conv = self.conv1d.scan(projected.qkv, state.conv, reset=reset, length=length)
        y, ssm = ops.gated_delta(
            *self._select(qkv, projected), state=state.ssm, reset=reset, length=length
        )
        return self._emit(y, projected.z).astype(x.dtype), GatedDeltaNetState(conv, ssm)

    @jax.named_scope("mamba_eqx.GatedDeltaNet.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: GatedDeltaNetState
    ) -> tuple[Float[Array, " {self.d_model}"], GatedDeltaNetState]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("GatedDeltaNet", self.d_model, x)
        state = checked_state(self, state)
        projected = self._project(x)
        qkv, conv = self.conv1d.step(projected.qkv, state.conv)
        y, ssm = ops.gated_delta_step(*self._select(qkv, projected), state=state.ssm)
        return self._emit(y, projected.z).astype(x.dtype), GatedDeltaNetState(conv, ssm)

    # The methods below accept one token or a sequence of tokens.

    def _project(self, x: Float[Array, "*seq {self.d_model}"]) -> _Projected:
        projected = self.in_proj(x)
        channels, nheads = self.conv1d.d_model, self.nheads
        ends = [channels, channels + self.d_inner, channels + self.d_inner + nheads]
        return _Projected(*jnp.split(projected, ends, axis=-1))

    def _select(self, qkv: Float[Array, "*seq channels"], projected: _Projected) -> _Selected:
        key_channels = self.ngroups * self.d_state
        q, k, v = jnp.split(jax.nn.silu(qkv), [key_channels, 2 * key_channels], axis=-1)
        by_group = (*q.shape[:-1], self.ngroups, self.d_state)
        dt = jax.nn.softplus(projected.dt.astype(self.dt_bias.dtype) + self.dt_bias)
        return _Selected(
            q=_unit(q.reshape(by_group)) * self.d_state**-0.5,
            k=_unit(k.reshape(by_group)),
            v=v.reshape(*v.shape[:-1], self.nheads, self.headdim),
            log_decay=dt * self.A,
            beta=jax.nn.sigmoid(projected.beta),
        )

    def _emit(
        self,
        y: Float[Array, "*seq {self.nheads} {self.headdim}"],
        z: Float[Array, "*seq {self.d_inner}"],
    ) -> Float[Array, "*seq {self.d_model}"]:
        return self.out_proj(self.norm(y, z.reshape(y.shape)).reshape(z.shape))


def _unit(t: Float[Array, "*seq ngroups d_state"]) -> Float[Array, "*seq ngroups d_state"]:
    """Scales queries or keys to length 1, in float32 or better."""
    t = t.astype(at_least_float32(t))
    # The number is that of the official kernels; without it, a zero would become NaN.
    return t * lax.rsqrt(jnp.sum(t**2, axis=-1, keepdims=True) + 1e-6)
