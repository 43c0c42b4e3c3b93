import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import export
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ... import ops
from ..._checks import check_count, to_python
from ..._dtypes import default_dtype
from .._arguments import check_token, checked_sequence, checked_state
from .._cache import AbstractCache
from .._conv import CausalConv1d
from .._linear import AbstractLinear, Linear
from .._protocol import AbstractSequenceLayer, Length, Reset
from ._validation import check_attention


class KVCache(AbstractCache):
    """The state of [`mamba_eqx.Attention`][]: keys and values of the tokens since the last reset.

    Token `n` is stored at index `n`, or, with a window, at index `n % window`. Unused entries are
    zero.

    - `conv`: the last `d_conv - 1` inputs of the convolution, oldest first; `None` without a
        convolution.
    - `k`: the keys, rotated if there is a rotary embedding, in the dtype of the parameters.
    - `v`: the values, in the dtype of the parameters.
    - `length`: the number of tokens since the last reset.
    - `rolling`: whether new tokens replace the oldest ones, which is the case with a window.
    """

    conv: Float[Array, "lag channels"] | None
    k: Float[Array, "nheads_kv room headdim"]
    v: Float[Array, "nheads_kv room headdim"]
    length: Int[Array, ""]
    rolling: bool = eqx.field(static=True)

    @property
    def overflowed(self) -> Bool[Array, "*batch"]:
        """Whether the cache got more tokens than it has room for, so that the outputs since then
        are NaN.

        Compiled functions cannot raise an error then. Check this after them, and before
        `with_room`: the argmax of NaN logits is a token like any other. False with a window.
        """
        return (self.length > self.k.shape[-2]) & (not self.rolling)

    def with_room(self, max_len: int) -> "KVCache":
        """See [`mamba_eqx.layers.AbstractCache.with_room`][]. A rolling cache never fills and is
        returned unchanged. In one that has overflowed, the tokens that were dropped become NaN.

        **Raises:** `ValueError` if `max_len` is not an integer of at least 0.
        """
        check_count("max_len", max_len, least=0)
        room = self.k.shape[-2]
        more = max_len - room
        if self.rolling or more <= 0:
            return self
        # Axes are counted from the end, because a batch or a stack adds leading axes.
        widths = [(0, 0)] * (self.k.ndim - 2) + [(0, more), (0, 0)]
        slot = jnp.arange(max_len)
        dropped = ((slot >= room) & (slot < self.length[..., None]))[..., None, :, None]
        longer = [jnp.where(dropped, jnp.nan, jnp.pad(array, widths)) for array in (self.k, self.v)]
        return eqx.tree_at(lambda cache: [cache.k, cache.v], self, longer)


class Attention(AbstractSequenceLayer[KVCache]):
    r"""Causal softmax attention, the other mixer of hybrid models.

    For every head, with an optional short convolution $\mathrm{conv1d}$ and an optional rotary
    embedding $R_t$ of position $t$,

    $$\begin{aligned}
    q, k, v &= \mathrm{conv1d}(W_\mathrm{in} x), \\
    p_t &= \mathrm{softmax}_s(\text{scale} \cdot (R_t q_t)^\top R_s k_s), \\
    y_t &= \sum_{s \le t} p_{ts} v_s, \\
    \text{out} &= W_\mathrm{out}\, y.
    \end{aligned}$$

    `in_proj` emits `[q, k, v]`, and query head `h` attends to the keys and values of head
    `h // (nheads // nheads_kv)`, as in the official checkpoints. The cache has the dtype of the
    parameters, in which `in_proj` emits keys and values; attention is computed in float32 or
    better. The time of a step is proportional to the capacity of the cache, used or not.

    The official module differs in two points. With a convolution, its `step` mistakes the
    convolution's outputs over the prompt for its inputs. And it can write past the end of its
    cache. Here that is a `ValueError` where the number of tokens in the cache is known. Inside
    `jax.jit`, `jax.vmap` and [`mamba_eqx.Stacked`][] it is not: there the output is NaN, as are all
    later outputs from that cache, even after `with_room`, until a reset, and
    `KVCache.overflowed` is true. (An error at run time would be a call of Python, with which no
    program can be exported, compiled for another device, or kept in the compilation cache.)

    Reference: Vaswani et al., *Attention is all you need* (2017); Shazeer, *Fast transformer
    decoding* (2019) and Ainslie et al., *GQA* (2023), for fewer heads of keys and values; official
    `mamba_ssm.modules.mha.MHA`.
    """

    in_proj: AbstractLinear
    conv1d: CausalConv1d | None
    out_proj: AbstractLinear
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

        - `d_model`: the number of features of the input and the output.
        - `nheads`: the number of heads of queries.
        - `nheads_kv`: the number of heads of keys and values, which must divide `nheads`; `nheads`
            by default.
        - `headdim`: the number of features per head; `d_model / nheads` by default.
        - `d_conv`: the number of taps of a convolution over queries, keys and values; 0 for no
            convolution.
        - `rotary_emb_dim`: the number of features per head with a rotary embedding, an even number;
            0 for no embedding.
        - `rotary_emb_base`: the base of the embedding's angles, a positive number; see
            [`mamba_eqx.ops.rotary_embedding`][]. Ignored without an embedding.
        - `rotary_emb_interleaved`: whether the embedding pairs neighbouring features, rather than
            the two halves. Ignored without an embedding.
        - `softmax_scale`: the factor of the scores, a positive number; `1 / sqrt(headdim)` by
            default.
        - `window`: the maximum number of tokens that a token attends to, including itself; `None`
            for all.
        - `qkv_proj_bias`, `out_proj_bias`: whether `in_proj` and `out_proj` have a bias. (The
            convolution always has one, as in the official module.)
        - `residual_scale`: multiplies the initial weight of `out_proj`; see
            [`mamba_eqx.Mamba1`][].
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, `nheads_kv` does not divide
        `nheads`, `nheads` does not divide `d_model` and there is no `headdim`, a number is not
        positive, `rotary_emb_dim` is odd or larger than `headdim`, or an option is invalid.
        """
        rotary_emb_base, softmax_scale = to_python(rotary_emb_base), to_python(softmax_scale)
        nheads_kv, headdim, softmax_scale = check_attention(
            d_model=d_model,
            nheads=nheads,
            nheads_kv=nheads_kv,
            headdim=headdim,
            d_conv=d_conv,
            rotary_emb_dim=rotary_emb_dim,
            rotary_emb_base=rotary_emb_base,
            rotary_emb_interleaved=rotary_emb_interleaved,
            softmax_scale=softmax_scale,
            window=window,
            qkv_proj_bias=qkv_proj_bias,
            out_proj_bias=out_proj_bias,
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
        # Options without an effect have one value, so that equal layers have equal structures.
        self.rotary_emb_base = float(rotary_emb_base) if rotary_emb_dim else 10000.0
        self.rotary_emb_interleaved = rotary_emb_interleaved if rotary_emb_dim else False
        self.softmax_scale = softmax_scale
        self.window = window

    def init_state(self, *, max_len: int | None = None) -> KVCache:
        """Returns an empty cache.

        **Arguments:**

        - `max_len`: the capacity in tokens, counted from the last reset. Ignored with a `window`,
            whose cache holds `window` tokens and never fills.

        **Raises:** `ValueError` if there is neither a window nor a `max_len`, or `max_len` is not
        an integer of at least 0.
        """
        room = max_len if self.window is None else self.window
        if room is None:
            raise ValueError(
                "`Attention` without a `window` needs the maximum number of tokens, but got "
                "max_len=None. Use `init_state(max_len=...)`. (`layer(x)` and `layer.scan(x)` need "
                "no state.)"
            )
        if not export.is_symbolic_dim(room):
            check_count("max_len", room, least=0)
        shape = (self.nheads_kv, room, self.headdim)
        return KVCache(
            conv=None if self.conv1d is None else self.conv1d.init_state(),
            k=jnp.zeros(shape, self.in_proj.dtype),
            v=jnp.zeros(shape, self.in_proj.dtype),
            length=jnp.zeros((), jnp.int32),
            rolling=self.window is not None,
        )

    @jax.named_scope("mamba_eqx.Attention.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: KVCache | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], KVCache]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][].

        Without a state, the capacity of the returned cache is the length of `x` (or the window). To
        continue after `x`, start from `init_state(max_len=...)` instead.
        """
        x = checked_sequence("Attention", self.d_model, x, reset, length)
        conv = cache = None
        start = 0
        if state is not None:
            state = self._checked(state)
            start = state.length
            self._check_room(state, x.shape[0], reset, length)
            conv, cache = state.conv, (state.k, state.v, start)
        positions = ops.document_positions(x.shape[0], start=start, reset=reset, length=length)
        qkv = self.in_proj(x)
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
            _raise_if_full(start >= state.k.shape[1], state.k.shape[1])
        qkv = self.in_proj(x)
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
        # A cache may have any capacity, so the state is compared with one of its own capacity.
        room = state.k.shape[-2] if isinstance(state, KVCache) and state.k.ndim > 1 else 1
        return checked_state(self, state, max_len=room)

    def _check_room(
        self, state: KVCache, seq: int, reset: Array | None, length: Array | int | None
    ) -> None:
        """Raises if `seq` more tokens are known not to fit into the cache."""
        room = state.k.shape[1]
        if self.window is not None or seq == 0:
            return
        more = seq if length is None else length  # A symbolic length is not an integer.
        if reset is None and isinstance(more, int) and more > room:
            raise ValueError(
                f"The cache given to `Attention` has room for {room} tokens, but got {more} "
                "more tokens. Start from `init_state(max_len=...)` with a larger `max_len`."
            )
        positions = ops.document_positions(seq, start=state.length, reset=reset, length=length)
        positions = ops.fill_padding(ops.real_tokens(seq, length), positions, 0)
        _raise_if_full(jnp.max(positions) >= room, room)

    # The methods below accept one token or a sequence of tokens.

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


def _raise_if_full(full: Bool[Array, ""], room: int) -> None:
    """Raises if `full` is true. Nothing is raised while JAX traces, when values are unknown."""
    if not isinstance(full, Tracer) and bool(full):
        raise ValueError(
            f"A cache of `Attention` is full: it has room for {room} tokens since the last reset. "
            "Start from `init_state(max_len=...)` with a larger `max_len`, or enlarge the cache "
            "with `cache.with_room(max_len)`."
        )
