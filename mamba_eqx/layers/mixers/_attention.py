import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ... import ops
from ..._dtypes import default_dtype
from .._arguments import check_sequence, check_token, checked_state
from .._cache import AbstractCache
from .._conv import CausalConv1d
from .._linear import Linear
from .._protocol import AbstractSequenceLayer
from ._validation import check_attention


class KVCache(AbstractCache):
    """What `Attention` remembers of the tokens since the last reset: the last inputs of its
    convolution, the keys and values, and the number of tokens.

    Token `n` is in place `n` of the room, or, with a window, in place `n % window`. Room that is
    not used is zero.
    """

    conv: Float[Array, "lag channels"] | None
    k: Float[Array, "nheads_kv room headdim"]
    v: Float[Array, "nheads_kv room headdim"]
    length: Int[Array, ""]
    rolls: bool = eqx.field(static=True)

    def with_room(self, max_len: int) -> "KVCache":
        """See [`mamba_eqx.layers.AbstractCache.with_room`][]. A rolling cache never fills."""
        more = max_len - self.k.shape[-2]
        if self.rolls or more <= 0:
            return self
        # Counted from the end, as there may be axes of a batch and of a stack in front.
        widths = [(0, 0)] * (self.k.ndim - 2) + [(0, more), (0, 0)]
        longer = [jnp.pad(array, widths) for array in (self.k, self.v)]
        return eqx.tree_at(lambda cache: [cache.k, cache.v], self, longer)


class Attention(AbstractSequenceLayer[KVCache]):
    r"""Causal softmax attention, the other mixer of hybrid models.

    With $\mathrm{conv}$ the optional short convolution and $R_t$ the optional rotary embedding of
    position $t$, for every head

    $$\begin{aligned}
    q, k, v &= \mathrm{conv1d}(W_{in} u), \\
    y_t &= \sum_{s \le t} p_{ts} v_s, \qquad
      p_t = \mathrm{softmax}_s(\text{scale} \cdot (R_t q_t)^\top R_s k_s), \\
    \text{out} &= W_{out}\, y.
    \end{aligned}$$

    `in_proj` emits `[q, k, v]`, and head `h` meets the keys and values of head
    `h // (nheads // nheads_kv)`, as in the official checkpoints. The cache is in the dtype of the
    parameters, in which keys and values come out of `in_proj`; what is computed with it is at least
    in float32. A step costs time in proportion to the room in the cache, used or not.

    It differs from the official module in `step` with a convolution, where that one takes the
    outputs of the convolution in the prompt for its inputs; and in that it cannot be written past
    the end of its cache, which is an error here.

    Reference: Vaswani et al., *Attention is all you need* (2017); Shazeer, *Fast transformer
    decoding* (2019) and Ainslie et al., *GQA* (2023), for fewer heads of keys and values; official
    `mamba_ssm.modules.mha.MHA`.
    """

    in_proj: Linear
    conv1d: CausalConv1d | None
    out_proj: Linear
    d_model: int = eqx.field(static=True)
    nheads: int = eqx.field(static=True)
    nheads_kv: int = eqx.field(static=True)
    headdim: int = eqx.field(static=True)
    rotary_emb_dim: int = eqx.field(static=True)
    rotary_emb_base: float = eqx.field(static=True)
    rotary_emb_interleaved: bool = eqx.field(static=True)
    softmax_scale: float = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        *,
        nheads: int,
        nheads_kv: int | None = None,
        headdim: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        softmax_scale: float | None = None,
        window: int | None = None,
        qkv_proj_bias: bool = False,
        out_proj_bias: bool = False,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is the official one.

        **Arguments:**

        - `d_model`: features of the input and the output.
        - `nheads`: heads of queries.
        - `nheads_kv`: heads of keys and values, which must divide `nheads`; by default as many.
        - `headdim`: features per head; `d_model / nheads` by default.
        - `d_conv`: taps of a convolution over queries, keys and values; 0 is none.
        - `rotary_emb_dim`: how many features of a head, an even number, have the rotary embedding.
        - `rotary_emb_base`: of its angles; see [`mamba_eqx.ops.rotary_embedding`][].
        - `rotary_emb_interleaved`: whether it pairs neighbours, or else halves.
        - `softmax_scale`: `1 / sqrt(headdim)` by default.
        - `window`: the most tokens that a token sees, itself included; all by default.
        - `qkv_proj_bias`, `out_proj_bias`: whether `in_proj` and `out_proj` have a bias. (The
            convolution always has one, as upstream.)
        - `residual_scale`: multiplies the initial weight of `out_proj`; see
            [`mamba_eqx.Mamba1`][].
        - `dtype`: of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: for the initial parameters.

        **Raises:** `ValueError` for a size that is not a positive integer or does not divide what
        it has to, or a rotary embedding that does not fit into a head.
        """
        nheads_kv = nheads if nheads_kv is None else nheads_kv
        headdim = check_attention(
            d_model, nheads, nheads_kv, headdim, d_conv, rotary_emb_dim, window
        )
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        channels = (nheads + 2 * nheads_kv) * headdim
        in_key, conv_key, out_key = jr.split(key, 3)
        self.in_proj = Linear(d_model, channels, use_bias=qkv_proj_bias, dtype=dtype, key=in_key)
        self.conv1d = None
        if d_conv > 0:
            self.conv1d = CausalConv1d(channels, d_conv, dtype=dtype, key=conv_key)
        self.out_proj = Linear(
            nheads * headdim,
            d_model,
            use_bias=out_proj_bias,
            dtype=dtype,
            scale=residual_scale,
            key=out_key,
        )
        self.d_model = d_model
        self.nheads = nheads
        self.nheads_kv = nheads_kv
        self.headdim = headdim
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = float(rotary_emb_base)
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.softmax_scale = headdim**-0.5 if softmax_scale is None else float(softmax_scale)
        self.window = window

    def init_state(self, *, max_len: int | None = None) -> KVCache:
        """An empty cache.

        **Arguments:**

        - `max_len`: the most tokens that it has room for, counted from the last reset. With a
            `window` it is ignored: the cache holds so many tokens and never fills up.

        **Raises:** `ValueError` if there is neither a window nor a `max_len`.
        """
        if self.window is None and max_len is None:
            raise ValueError(
                "`Attention` remembers every token and has to know how many there will be: use "
                "`init_state(max_len=...)`. (`layer(x)` and `layer.scan(x)` need no state.)"
            )
        room = self.window if max_len is None or self.window is not None else max_len
        dtype = self.in_proj.weight.dtype
        empty = jnp.zeros((self.nheads_kv, room, self.headdim), dtype)  # pyright: ignore
        return KVCache(
            conv=None if self.conv1d is None else self.conv1d.init_state(),
            k=empty,
            v=empty,
            length=jnp.zeros((), jnp.int32),
            rolls=self.window is not None,
        )

    @jax.named_scope("mamba_eqx.Attention.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: KVCache | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], KVCache]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][].

        Without a state, the cache that is returned is full: it has room for `x` alone (or for a
        window). To go on, start from `init_state(max_len=...)`.
        """
        check_sequence("Attention", self.d_model, x, reset, length)
        conv = cache = None
        start = 0
        if state is not None:
            state = self._checked(state)
            start = self._with_room_for(state, x.shape[0], reset, length)
            conv, cache = state.conv, (state.k, state.v, start)
        positions = ops.document_positions(x.shape[0], start=start, reset=reset, length=length)
        qkv = self.in_proj(x.astype(self.in_proj.weight.dtype))
        if self.conv1d is not None:
            qkv, conv = self.conv1d.scan(qkv, conv, reset=reset, length=length)
        y, (k, v, end) = ops.attention(
            *self._split(qkv, positions),
            state=cache,
            reset=reset,
            length=length,
            scale=self.softmax_scale,
            window=self.window,
        )
        return self._emit(y).astype(x.dtype), KVCache(conv, k, v, end, self.window is not None)

    @jax.named_scope("mamba_eqx.Attention.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: KVCache
    ) -> tuple[Float[Array, " {self.d_model}"], KVCache]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Attention", self.d_model, x)
        state = self._checked(state)
        conv, start = state.conv, state.length
        if self.window is None:
            start = _with_room(start, start >= state.k.shape[1], state.k.shape[1])
        qkv = self.in_proj(x.astype(self.in_proj.weight.dtype))
        if self.conv1d is not None and conv is not None:
            qkv, conv = self.conv1d.step(qkv, conv)
        y, (k, v, end) = ops.attention_step(
            *self._split(qkv, start),
            state=(state.k, state.v, start),
            scale=self.softmax_scale,
            window=self.window,
        )
        return self._emit(y).astype(x.dtype), KVCache(conv, k, v, end, self.window is not None)

    def _checked(self, state: KVCache) -> KVCache:
        # Any room will do, so that of the state itself is what it is compared with.
        room = state.k.shape[-2] if isinstance(state, KVCache) and state.k.ndim > 1 else 1
        return checked_state(self, state, max_len=room)

    def _with_room_for(
        self, state: KVCache, seq: int, reset: Array | None, length: Array | int | None
    ) -> Int[Array, ""]:
        """The number of tokens in the cache, after checking that `seq` more will fit."""
        room = state.k.shape[1]
        if self.window is not None or seq == 0:
            return state.length
        if reset is None and isinstance(length, int | None):
            more = seq if length is None else length
            if more > room:
                raise ValueError(
                    f"The cache given to `Attention` has room for {room} tokens, but got {more} "
                    "more. Start from `init_state(max_len=...)` with a larger `max_len`."
                )
        positions = ops.document_positions(seq, start=state.length, reset=reset, length=length)
        if length is not None:
            positions = jnp.where(jnp.arange(seq) < length, positions, 0)
        return _with_room(state.length, jnp.max(positions) >= room, room)

    # Of one token or of a sequence: the axes in front do not matter.

    def _split(
        self, qkv: Float[Array, "*seq channels"], positions: Int[Array, "*seq"]
    ) -> tuple[
        Float[Array, "*seq {self.nheads} {self.headdim}"],
        Float[Array, "*seq {self.nheads_kv} {self.headdim}"],
        Float[Array, "*seq {self.nheads_kv} {self.headdim}"],
    ]:
        heads = qkv.reshape(*qkv.shape[:-1], self.nheads + 2 * self.nheads_kv, self.headdim)
        qk, v = jnp.split(heads, [self.nheads + self.nheads_kv], axis=-2)
        if self.rotary_emb_dim > 0:
            qk = ops.rotary_embedding(
                qk,
                positions,
                dim=self.rotary_emb_dim,
                base=self.rotary_emb_base,
                interleaved=self.rotary_emb_interleaved,
            )
        q, k = jnp.split(qk, [self.nheads], axis=-2)
        return q, k, v

    def _emit(
        self, y: Float[Array, "*seq {self.nheads} {self.headdim}"]
    ) -> Float[Array, "*seq {self.d_model}"]:
        return self.out_proj(y.reshape(*y.shape[:-2], self.nheads * self.headdim))


def _with_room(length: Int[Array, ""], full: Bool[Array, ""], room: int) -> Int[Array, ""]:
    """`length`, or an error at run time."""
    return eqx.error_if(
        length,
        full,
        f"A cache of `Attention` is full: it has room for {room} tokens since the last reset. "
        "Start from `init_state(max_len=...)` with a larger `max_len`, or enlarge the cache by "
        "`cache.with_room(max_len)`.",
    )
