from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._dtypes import at_least_float32
from ._chunks import cut_into_chunks
from ._masks import expand, freeze, last_resets, real_tokens


Cache = tuple[
    Float[Array, "nheads_kv room headdim"], Float[Array, "nheads_kv room headdim"], Int[Array, ""]
]
"""The keys and values of earlier tokens, and the number of tokens. Heads come first, so that the
products with it are plain matrix products: with time first a decoding step takes twice to five
times as long on a CPU."""


# In the einsums: q and k count queries and keys, g the heads of keys, r those of the queries that
# share one, d the features of a head.


@partial(jax.jit, static_argnames=("scale", "window", "block_size"))
@jax.named_scope("mamba_eqx.ops.attention")
def attention(
    q: Float[Array, "seq nheads headdim"],
    k: Float[Array, "seq nheads_kv headdim"],
    v: Float[Array, "seq nheads_kv headdim"],
    *,
    state: Cache | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    window: int | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "seq nheads headdim"], Cache]:
    r"""Causal softmax attention,

    $$y_t = \sum_{s \le t} p_{ts} v_s, \qquad
      p_t = \mathrm{softmax}_s(\text{scale} \cdot q_t^\top k_s).$$

    Head `h` of the queries meets head `h // (nheads // nheads_kv)` of the keys and values. Queries
    are taken a block at a time, in reverse as well, so that no matrix of `seq` times `seq` is held.
    All is computed at least in float32.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values, time first.
    - `state`: the `(keys, values, number)` of the tokens before these. The arrays have room for so
        many tokens; unused room is zero. The empty past with room for `seq` tokens if `None`.
    - `reset`: where true, the tokens before that one are never seen again.
    - `length`: only the first `length` tokens are real; the state returned is the one after them.
    - `scale`: `1 / sqrt(headdim)` by default.
    - `window`: the most tokens that a query sees, its own included. The state then has room for
        just these, and the newest takes the place of the oldest (token `n` that of `n % window`).
    - `block_size`: queries per block; `None` leaves the choice to this function.

    **Returns:**

    The outputs, in the dtype of `q`, and the state: that of the tokens since the last reset. A
    token for which there was no room is not in it, and its output is NaN.
    """
    seq, nheads, headdim = q.shape
    nheads_kv = k.shape[1]
    _check_heads(nheads, nheads_kv)
    room = _room(state, window, seq)
    start = jnp.zeros((), jnp.int32) if state is None else state[2]
    if seq == 0:
        empty = jnp.zeros((nheads_kv, room, headdim), k.dtype)
        return q, (empty, empty, start) if state is None else state
    real = real_tokens(seq, length)
    begin = last_resets(seq, reset, real)
    # Padding may be anything, even NaN: no real query sees it, but 0 * NaN is NaN.
    k, v = jnp.swapaxes(freeze(real, k, 0), 0, 1), jnp.swapaxes(freeze(real, v, 0), 0, 1)

    # Tokens of this piece count from 0, those before it backwards from -1. A query sees the tokens
    # from the first that it may see to itself.
    index = jnp.arange(seq, dtype=jnp.int32)
    first = jnp.where(begin < 0, -start, begin)
    if window is not None:
        first = jnp.maximum(first, index - window + 1)
    pieces = [(k, v, index)]
    if state is not None:
        past = _past(state, window, seq, forgotten=begin[0] >= 0)
        pieces = [past, *pieces] if window is None else [_joined(past, pieces[0])]

    attend = partial(_attend, scale=headdim**-0.5 if scale is None else scale, window=window)
    queries = q.reshape(seq, nheads_kv, nheads // nheads_kv, headdim)
    size = _BLOCK if block_size is None else block_size
    if seq <= size:
        y = attend(pieces, (queries, index, first))
    else:
        blocks = cut_into_chunks(size, (queries, index, first))
        body = jax.checkpoint(partial(attend, pieces), prevent_cse=False)
        y = lax.map(body, blocks).reshape(-1, *queries.shape[1:])[:seq]
    y = y.reshape(q.shape)
    if state is not None and window is None:
        y = jnp.where(expand(index - first >= room, y), jnp.nan, y)

    if state is None and window is None and reset is None and length is None:
        return y, (k, v, jnp.asarray(seq, jnp.int32))
    count = jnp.asarray(seq if length is None else length, jnp.int32)
    return y, _remember(k, v, state, begin[-1], count, room, window)


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
    """One token of [`mamba_eqx.ops.attention`][]: the same arguments, for one token."""
    nheads, headdim = q.shape
    nheads_kv = k.shape[0]
    _check_heads(nheads, nheads_kv)
    room = _room(state, window, 1)
    keys, values, start = state
    slot = start if window is None else start % room
    # Where there is no room, this overwrites the last token, and the output is NaN.
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


_BLOCK = 128  # queries


# Keys and values (heads first), and where they are: counted as the queries are.
_Piece = tuple[Array, Array, Array]


def _attend(
    pieces: list[_Piece],
    queries: tuple[
        Float[Array, "block nheads_kv shared headdim"], Int[Array, " block"], Int[Array, " block"]
    ],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "block nheads_kv shared headdim"]:
    """A block of queries, each with its place and that of the first key it sees."""
    q, index, first = queries
    if window is not None:
        size = window + len(index) - 1
        pieces = [_near(piece, index[0] - window + 1, size) for piece in pieces]
    scores = []
    for k, _, at in pieces:
        seen = (first[:, None] <= at) & (at <= index[:, None])
        score = _product("qgrd,gkd->grqk", q, k)
        score = score * jnp.asarray(scale, score.dtype)
        # Not minus infinity: a query of padding may see nothing, and its softmax would be NaN.
        scores.append(jnp.where(seen, score, jnp.finfo(score.dtype).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1))
    cuts = [score.shape[-1] for score in scores[:-1]]
    parts = jnp.split(weights, cuts, axis=-1)
    y = jnp.zeros((), weights.dtype)
    for part, (_, v, _) in zip(parts, pieces, strict=True):
        y = y + _product("grqk,gkd->qgrd", part, v)
    return y.astype(q.dtype)


def _joined(earlier: _Piece, later: _Piece) -> _Piece:
    """In order, so that a block of queries can cut out what it sees through a window."""
    pairs = zip(earlier, later, (1, 1, 0), strict=True)
    k, v, at = (jnp.concatenate([one, other], axis) for one, other, axis in pairs)
    return k, v, at


def _near(piece: _Piece, index: Int[Array, ""], size: int) -> _Piece:
    """Of keys in order, `size` of them from `index` on (or the last `size`)."""
    k, v, at = piece
    size = min(size, len(at))
    begin = jnp.maximum(index - at[0], 0)
    cut = partial(lax.dynamic_slice_in_dim, start_index=begin, slice_size=size)
    return cut(k, axis=1), cut(v, axis=1), cut(at)


def _past(state: Cache, window: int | None, seq: int, forgotten: Bool[Array, ""]) -> _Piece:
    k, v, start = state
    # What no query sees may be anything, as padding may.
    k, v = (jnp.where(forgotten, jnp.zeros_like(a), a) for a in (k, v))
    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    if window is None:
        return k, v, jnp.where(slot < start, slot - start, seq)  # seq: after all queries
    # The oldest first. Before the beginning there are zeros, which no query sees.
    k, v = (jnp.roll(a, -(start % window), axis=1) for a in (k, v))
    return k, v, slot - window


def _remember(
    k: Float[Array, "nheads_kv seq headdim"],
    v: Float[Array, "nheads_kv seq headdim"],
    state: Cache | None,
    begin: Int[Array, ""],
    count: Int[Array, ""],
    room: int,
    window: int | None,
) -> Cache:
    """The cache after `count` tokens, the last of which belong to a document that began at `begin`
    (or, if negative, before them)."""
    start = jnp.zeros((), jnp.int32) if state is None else state[2]
    before = jnp.where(begin < 0, start, -begin)  # the position of token 0
    total = before + count
    slot = jnp.arange(room, dtype=jnp.int32)
    # The position of the token that belongs into each slot, and that token's place in the piece.
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
    return write(k, keys), write(v, values), total


def _room(state: Cache | None, window: int | None, seq: int) -> int:
    if state is None:
        return seq if window is None else window
    room = state[0].shape[1]
    if window not in (None, room):
        raise ValueError(
            f"With window={window} the state must have room for {window} tokens, but has room for "
            f"{room}."
        )
    return room


def _check_heads(nheads: int, nheads_kv: int) -> None:
    if nheads % nheads_kv:
        raise ValueError(
            "The number of heads of keys and values must divide that of queries, but got "
            f"{nheads_kv} and {nheads}."
        )


def _product(subscripts: str, a: Array, b: Array) -> Array:
    # Cast, and not by `preferred_element_type`: XLA's CPU backend lacks some of those products of
    # bfloat16 (of 4 queries and 4 keys, say).
    dtype = at_least_float32(a, b)
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype))
