from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Bool, Float, Int, Integer

from .._dtypes import at_least_float32
from .._trees import cut_into_chunks
from ._arguments import check_kv_heads, size_or_default
from ._masks import document_starts, fill_padding, real_tokens
from ._pieces import refuse_piece


Cache = tuple[
    Float[Array, "nheads_kv room headdim"], Float[Array, "nheads_kv room headdim"], Int[Array, ""]
]
"""The keys and values of earlier tokens, and the number of these tokens. Heads come first, so that
the products with the cache are plain matrix products: with time first a decoding step takes two to
five times as long on a CPU."""


# Subscripts: q and k count queries and keys, g the heads of keys, r the query heads that share one,
# d the features of a head.


class _Keys(NamedTuple):
    """Keys and values, heads first, and the offset of each from the first token of the call."""

    k: Float[Array, "nheads_kv keys headdim"]
    v: Float[Array, "nheads_kv keys headdim"]
    offset: Int[Array, " keys"]


class _Queries(NamedTuple):
    """Queries, one block or all blocks of them, with the range of keys that each sees."""

    q: Float[Array, "*block nheads_kv shared headdim"]
    offset: Int[Array, "*block"]
    """The offset of the query, which is also the offset of the last key that it sees."""
    first: Int[Array, "*block"]
    """The offset of the first key it sees."""


@partial(jax.jit, static_argnames=("scale", "window", "block_size"))
@jax.named_scope("mamba_eqx.ops.attention")
def attention(
    q: Float[Array, "seq nheads headdim"],
    k: Float[Array, "seq nheads_kv headdim"],
    v: Float[Array, "seq nheads_kv headdim"],
    *,
    state: Cache | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    scale: float | None = None,
    window: int | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "seq nheads headdim"], Cache]:
    r"""Computes causal softmax attention,

    $$y_t = \sum_{s \le t} p_{ts} v_s, \qquad
      p_t = \mathrm{softmax}_s(\text{scale} \cdot q_t^\top k_s).$$

    Query head `h` uses head `h // (nheads // nheads_kv)` of the keys and values. The forward and
    the reverse pass run one block of queries after another, so that no `seq` by `seq` matrix is
    in memory. Everything is computed in float32 or better.

    **Arguments:**

    - `q`: the queries, shape `(seq, nheads, headdim)`.
    - `k`, `v`: the keys and values, shape `(seq, nheads_kv, headdim)`.
    - `state`: the earlier tokens, as returned: keys and values, shape `(nheads_kv, room, headdim)`,
        and the number of tokens. `room` is the capacity, and unused entries are zero. `None` is the
        empty past with a capacity of `seq` tokens.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.
    - `scale`: the factor of the scores, `1 / sqrt(headdim)` by default.
    - `window`: the maximum number of tokens that a query sees, itself included; no limit if `None`.
        With a window, the capacity of the state equals the window, and the newest token overwrites
        the oldest: token `n` is entry `n % window`.
    - `block_size`: queries per block, at least 1; `None` selects the size automatically.

    **Returns:**

    The outputs, shape `(seq, nheads, headdim)`, in the dtype of `q`, and the state with the tokens
    since the last reset. Tokens beyond its capacity are dropped: their outputs are NaN, and so is
    the last entry of the state, so that no later output misses them unnoticed.

    **Raises:** `ValueError` if `nheads_kv` does not divide `nheads`, the capacity of `state` is not
    `window`, or `block_size` is less than 1.
    """
    seq, nheads, headdim = q.shape
    nheads_kv = k.shape[1]
    check_kv_heads(nheads, nheads_kv)
    refuse_piece("attention", q)
    size = size_or_default("block_size", block_size, _BLOCK_SIZE)
    room = _capacity(state, window, seq)
    start = jnp.zeros((), jnp.int32) if state is None else state[2]
    if seq == 0:
        if state is not None:
            return q, state
        keys, values = (jnp.zeros((nheads_kv, room, headdim), k.dtype) for _ in range(2))
        return q, (keys, values, start)
    real = real_tokens(seq, length)
    begin = document_starts(seq, reset, real)
    # No real query sees padding, but padding may be NaN, which times zero is NaN.
    q, k, v = (fill_padding(real, t, 0) for t in (q, k, v))
    k, v = (jnp.swapaxes(t, 0, 1) for t in (k, v))

    # Offsets count these tokens from 0 on, and earlier ones backwards from -1. A query sees the
    # keys from `first` to itself.
    offset = jnp.arange(seq, dtype=jnp.int32)
    first = jnp.where(begin < 0, -start, begin)
    if window is not None:
        first = jnp.maximum(first, offset - window + 1)
    pieces = [_Keys(k, v, offset)]
    newest_bad = None
    if state is not None:
        past, newest_bad = _earlier_keys(state, window, seq)
        pieces = [past, *pieces] if window is None else [_concatenate(past, pieces[0])]

    # A window cuts its keys out of all keys, of which a symbolic length may have too few.
    symbolic = export.is_symbolic_dim(seq)
    attend = partial(
        _attend,
        scale=headdim**-0.5 if scale is None else scale,
        window=None if symbolic else window,
    )
    queries = _Queries(q.reshape(seq, nheads_kv, nheads // nheads_kv, headdim), offset, first)
    if not symbolic and seq <= size:
        y = attend(pieces, queries)
    else:
        blocks = cut_into_chunks(size, queries)
        body = jax.checkpoint(partial(attend, pieces), prevent_cse=False)
        y = lax.map(body, blocks).reshape(-1, *queries.q.shape[1:])[:seq]
    if newest_bad is not None:
        lost = first[:, None] <= newest_bad
        if window is None:
            lost |= (offset - first >= room)[:, None]
        if real is not None:
            # NaN in an output of padding would reach the gradients of what reads the outputs.
            lost &= real[:, None]
        y = jnp.where(lost[..., None, None], jnp.nan, y)
    y = y.reshape(q.shape)

    if state is None and window is None and reset is None and length is None:
        return y, (k, v, jnp.asarray(seq, jnp.int32))
    count = jnp.asarray(seq if length is None else length, jnp.int32)
    return y, _updated_cache(k, v, state, begin[-1], count, room, window)


@partial(jax.jit, static_argnames=("scale", "window"))
@jax.named_scope("mamba_eqx.ops.attention_step")
def attention_step(
    q: Float[Array, "nheads headdim"],
    k: Float[Array, "nheads_kv headdim"],
    v: Float[Array, "nheads_kv headdim"],
    *,
    state: Cache,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "nheads headdim"], Cache]:
    """Computes one token of [`mamba_eqx.ops.attention`][].

    **Arguments:**

    - `q`: the query, shape `(nheads, headdim)`.
    - `k`, `v`: the key and the value, shape `(nheads_kv, headdim)`.
    - `state`: the earlier tokens, as for [`mamba_eqx.ops.attention`][].
    - `scale`: the factor of the scores, `1 / sqrt(headdim)` by default.
    - `window`: the maximum number of tokens that the query sees, itself included; no limit if
        `None`.

    **Returns:**

    The output, shape `(nheads, headdim)`, in the dtype of `q`, and the state with this token. If
    the state was full, the output and the last entry of the state are NaN.

    **Raises:** `ValueError` if `nheads_kv` does not divide `nheads`, or the capacity of `state` is
    not `window`.
    """
    nheads, headdim = q.shape
    nheads_kv = k.shape[0]
    check_kv_heads(nheads, nheads_kv)
    room = _capacity(state, window, 1)
    keys, values, start = state
    if room == 0:
        return jnp.full_like(q, jnp.nan), (keys, values, start + 1)
    slot = start if window is None else start % room
    if window is None:  # In a full state, this overwrites the last token.
        k, v = (jnp.where(start < room, t, jnp.nan) for t in (k, v))
    keys = lax.dynamic_update_slice_in_dim(keys, k[:, None], slot, axis=1)
    values = lax.dynamic_update_slice_in_dim(values, v[:, None], slot, axis=1)
    seen = jnp.arange(room, dtype=jnp.int32) <= start
    scores = _product("grd,gkd->grk", q.reshape(nheads_kv, nheads // nheads_kv, headdim), keys)
    scores = scores * jnp.asarray(headdim**-0.5 if scale is None else scale, scores.dtype)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
    y = _product("grk,gkd->grd", weights, values).astype(q.dtype).reshape(q.shape)
    if window is None:
        y = jnp.where(start < room, y, jnp.nan)
    return y, (keys, values, start + 1)


_BLOCK_SIZE = 128


def _attend(
    pieces: list[_Keys], queries: _Queries, *, scale: float, window: int | None
) -> Float[Array, "block nheads_kv shared headdim"]:
    """Returns the outputs of one block of queries."""
    q, offset, first = queries
    if window is not None:
        size = window + len(offset) - 1
        pieces = [_slice_keys(piece, offset[0] - window + 1, size) for piece in pieces]
    scores = []
    for k, _, at in pieces:
        seen = (first[:, None] <= at) & (at <= offset[:, None])
        score = _product("qgrd,gkd->grqk", q, k)
        score = score * jnp.asarray(scale, score.dtype)
        # With minus infinity, the softmax of a padding query that sees no key would be NaN.
        scores.append(jnp.where(seen, score, jnp.finfo(score.dtype).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1))
    cuts = [score.shape[-1] for score in scores[:-1]]
    parts = jnp.split(weights, cuts, axis=-1)
    y = jnp.zeros((), weights.dtype)
    for part, (_, v, _) in zip(parts, pieces, strict=True):
        y = y + _product("grqk,gkd->qgrd", part, v)
    return y.astype(q.dtype)


def _concatenate(earlier: _Keys, later: _Keys) -> _Keys:
    """Joins keys in the order of their offsets, so that `_slice_keys` can cut out a window."""
    return _Keys(
        jnp.concatenate([earlier.k, later.k], axis=1),
        jnp.concatenate([earlier.v, later.v], axis=1),
        jnp.concatenate([earlier.offset, later.offset]),
    )


def _slice_keys(keys: _Keys, offset: Int[Array, ""], size: int) -> _Keys:
    """Returns `size` consecutive keys from `offset` on, clamped to the first and the last key."""
    size = min(size, len(keys.offset))
    begin = jnp.maximum(offset - keys.offset[0], 0)
    cut = partial(lax.dynamic_slice_in_dim, start_index=begin, slice_size=size)
    return _Keys(cut(keys.k, axis=1), cut(keys.v, axis=1), cut(keys.offset))


def _earlier_keys(
    state: Cache, window: int | None, seq: int
) -> tuple[_Keys, Int[Array, " nheads_kv"]]:
    """Returns the keys and values of a state with their offsets, and for each head the offset of
    the newest of them that is not finite.

    Those are returned as zeros, since a weight of zero would not hide them from the queries after a
    reset. The queries that see one must get NaN.
    """
    k, v, start = state
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    if window is None:
        # Unused room gets the offset `seq`, which is later than all queries.
        offset = jnp.where(slot < start, slot - start, seq)
    else:
        # The oldest key comes first. Until the window is full, zeros precede it, which no query
        # sees.
        k, v = (jnp.roll(a, -(start % window), axis=1) for a in (k, v))
        offset = slot - window
    bad = ~jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=-1)
    none = jnp.iinfo(jnp.int32).min
    newest = jnp.max(jnp.where(bad & (offset < 0), offset, none), axis=1, initial=none)
    k, v = (jnp.where(bad[..., None], jnp.zeros_like(a), a) for a in (k, v))
    return _Keys(k, v, offset), newest


def _updated_cache(
    k: Float[Array, "nheads_kv seq headdim"],
    v: Float[Array, "nheads_kv seq headdim"],
    state: Cache | None,
    begin: Int[Array, ""],
    count: Int[Array, ""],
    room: int,
    window: int | None,
) -> Cache:
    """Returns the cache after new tokens.

    **Arguments:**

    - `k`, `v`: the new keys and values, heads first.
    - `state`: the cache before them.
    - `begin`: the offset at which the last document starts; negative if before these tokens.
    - `count`: the number of real tokens.
    - `room`: the capacity of the cache.
    - `window`: as for `attention`.
    """
    start = jnp.zeros((), jnp.int32) if state is None else state[2]
    before = jnp.where(begin < 0, start, -begin)  # The position of token 0.
    total = before + count
    slot = jnp.arange(room, dtype=jnp.int32)
    # `position` is the position of the token that each slot will hold, and `token` its offset.
    position = slot if window is None else total - 1 - (total - 1 - slot) % room
    token = position - before
    new = (position >= 0) & (token >= 0) & (token < count)
    source = jnp.clip(token, 0, k.shape[1] - 1)

    def write(pieces: Array, cache: Array | None) -> Array:
        rest = jnp.zeros((), pieces.dtype)
        if cache is not None:
            rest = jnp.where(begin < 0, cache, rest)
        return jnp.where(new[:, None], jnp.take(pieces, source, axis=1), rest)

    keys, values, _ = (None, None, None) if state is None else state
    keys, values = write(k, keys), write(v, values)
    if state is not None and window is None:
        lost = (slot == room - 1) & (total > room)
        keys, values = (jnp.where(lost[:, None], jnp.nan, t) for t in (keys, values))
    return keys, values, total


def _capacity(state: Cache | None, window: int | None, seq: int) -> int:
    """Returns the capacity of the state in tokens, after checking that it equals the window."""
    if state is None:
        return seq if window is None else window
    room = state[0].shape[1]
    if window not in (None, room):
        raise ValueError(
            f"With window={window} the state must have room for {window} tokens, but has room for "
            f"{room}."
        )
    return room


def _product(subscripts: str, a: Array, b: Array) -> Array:
    # XLA's CPU backend lacks some products of bfloat16 with a float32 result (of 4 queries and 4
    # keys, for example), so the arguments are cast instead of giving `preferred_element_type`.
    dtype = at_least_float32(a, b)
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype))
