from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..._trees import cut_into_chunks
from .._chunks import decays_between, keep_where, visibility
from .._rotary import cos_sin, rotate, wrap
from ._step import per_rank, rotate_per_head
from ._types import Parameters, State, Tokens


# Subscripts: l, s tokens (of output and input), h heads, r ranks, p channels of a head, n state
# dimensions, a angles, c chunks; i, j the outputs and the inputs of a chunk, over tokens and ranks.


class _Rotations(NamedTuple):
    """The rotations of all tokens, in chunks with the heads first."""

    cos: Float[Array, "chunks nheads chunk pairs"]
    sin: Float[Array, "chunks nheads chunk pairs"]
    last: Float[Array, "nheads pairs"]
    """The angle of the last token."""


class _ChunkTokens(NamedTuple):
    """The tokens of a sequence, of one chunk, or of all chunks."""

    x: Float[Array, "*chunk nheads headdim"]
    log_decay: Float[Array, "*chunk nheads"]
    own_weight: Float[Array, "*chunk nheads"]
    """The weight of a token in its own output, `trap * dt`."""
    weight: Float[Array, "*chunk nheads"]
    """The weight of a token in all later outputs, which includes its term in the next token."""
    B: Float[Array, "*chunk rank ngroups d_state"]
    C: Float[Array, "*chunk rank ngroups d_state"]
    reset: Bool[Array, "*chunk"] | None


def chunked(
    chunk_size: int,
    tokens: Tokens,
    parameters: Parameters,
    before: State,
    reset: Bool[Array, " seq"] | None,
    real: Bool[Array, " seq"] | None,
    interleaved: bool,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    """Runs one chunk after another. Tokens with `dt = 0` fill up the last chunk.

    **Arguments:**

    - `chunk_size`: tokens per chunk.
    - `tokens`, `parameters`: the inputs of the op; padding is zero.
    - `before`: the state before the first token.
    - `reset`: true where a token forgets everything before it, or `None`.
    - `real`: false for padding, or `None` if all tokens are real.
    - `interleaved`: whether neighbouring dimensions form the pairs.

    **Returns:**

    The outputs, and the state after the last real token.
    """
    x, dt, A, B, C, trap, angles = tokens
    D, B_bias, C_bias, mimo_x = parameters
    finite = _finite_heads(before)
    if reset is not None:
        # A non-finite state would spread into all products of its chunk, even beyond a reset. NaN
        # is put back at the end, into the outputs and states that depend on it.
        before = _select_heads(finite & ~reset[0], before, 0.0)
    rotations = _rotations(chunk_size, dt, angles, before.angle, reset)

    # Each chunk gets the state with the terms of the previous token, up to that token's decay.
    gamma = trap * dt
    late = (1 - trap) * dt
    pending = jnp.einsum("rhn,rhp->hpn", late[0, :, None] * before.k, per_rank(before.x, mimo_x))
    later = jnp.concatenate([late[1:], jnp.zeros_like(late[:1])])

    # With each pair split between the two halves, all operands of the rotations are contiguous.
    order = _in_halves if interleaved else lambda t: t
    chunk_tokens = _ChunkTokens(
        x=x,
        log_decay=dt * A,
        own_weight=gamma,
        weight=gamma + later,
        B=order(B),
        C=order(C),
        reset=reset,
    )
    in_halves = Parameters(D, order(B_bias), order(C_bias), mimo_x)

    # `prevent_cse=True` is needed outside loops only.
    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(h: Array, inputs: tuple[Array, Array, _ChunkTokens]) -> tuple[Array, Array]:
        cos, sin, tokens = inputs
        y, h = _chunk(cos, sin, tokens, in_halves, h)
        return h, y

    chunks = (rotations.cos, rotations.sin, cut_into_chunks(chunk_size, chunk_tokens))
    h, y = lax.scan(chunk, order(before.h + pending), chunks)
    h = _out_of_halves(h) if interleaved else h

    # The key and the input of the last real token, if there is one.
    seq = x.shape[0]
    length = seq if real is None else jnp.sum(real)
    B_last, x_last = (
        lax.dynamic_index_in_dim(t, jnp.maximum(length - 1, 0), keepdims=False) for t in (B, x)
    )
    angle = rotations.last
    k = jnp.where(length > 0, rotate_per_head(B_last, B_bias, angle, interleaved), before.k)
    after = State(angle, h, k, x=jnp.where(length > 0, x_last, before.x))
    y = y.reshape(-1, *y.shape[2:])[:seq]
    if reset is not None:
        lost = ~finite & (jnp.cumsum(reset) == 0)[:, None]
        y = jnp.where(lost[:, None, :, None], jnp.nan, y)
        after = _select_heads(~lost[-1], after, jnp.nan)
    return y, after


def last_angle(
    chunk_size: int,
    dt: Float[Array, "seq nheads"],
    angles: Float[Array, "seq pairs"],
    angle: Float[Array, "nheads pairs"],
    reset: Bool[Array, " seq"] | None,
) -> Float[Array, "nheads pairs"]:
    """Returns the angle after the last token, from the angle before the first."""
    return _rotations(chunk_size, dt, angles, angle, reset).last


def _finite_heads(state: State) -> Bool[Array, " nheads"]:
    """Returns which heads have a finite state."""
    angle, h, k, x = (jnp.isfinite(t) for t in state)
    return angle.all(axis=1) & h.all(axis=(1, 2)) & k.all(axis=(0, 2)) & x.all(axis=1)


def _select_heads(mask: Bool[Array, " nheads"], state: State, otherwise: float) -> State:
    """Returns the state of the heads in `mask`, and `otherwise` for the others."""
    angle, k, x = (jnp.where(mask[:, None], t, otherwise) for t in (state.angle, state.k, state.x))
    return State(angle, jnp.where(mask[:, None, None], state.h, otherwise), k, x)


def _rotations(
    chunk_size: int,
    dt: Float[Array, "seq nheads"],
    angles: Float[Array, "seq pairs"],
    angle: Float[Array, "nheads pairs"],
    reset: Bool[Array, " seq"] | None,
) -> _Rotations:
    """Returns the cosine and sine of each token's angle, and the final angle.

    Angles are summed within chunks, and from chunk to chunk modulo 2 pi: a sum over a long sequence
    would leave no digits for the angle.
    """
    dt, angles, reset = cut_into_chunks(chunk_size, (dt, angles, reset))
    if reset is None:
        visible, sees_start = visibility(None, dt.shape[1])
        subscripts = "ls,csha->chla"
    else:
        visible, sees_start = jax.vmap(lambda reset: visibility(reset, dt.shape[1]))(reset)
        subscripts = "cls,csha->chla"
    increments = wrap(dt[..., None] * angles[:, :, None])
    within = jnp.einsum(
        subscripts, visible.astype(increments.dtype), increments, precision=lax.Precision.HIGHEST
    )
    sees_start = jnp.broadcast_to(sees_start, dt.shape[:2])

    def chunk(angle: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        total, sees_start = inputs
        return wrap(total + keep_where(sees_start, angle)), angle

    angle, starts = lax.scan(chunk, angle, (within[:, :, -1], sees_start[:, -1]))
    starts = jnp.where(sees_start[:, None, :, None], starts[:, :, None], 0)
    return _Rotations(*cos_sin(wrap(within + starts)), last=angle)


def _chunk(
    cos: Float[Array, "nheads chunk pairs"],
    sin: Float[Array, "nheads chunk pairs"],
    tokens: _ChunkTokens,
    parameters: Parameters,
    h: Float[Array, "nheads headdim d_state"],
) -> tuple[Float[Array, "chunk rank nheads headdim"], Float[Array, "nheads headdim d_state"]]:
    """Runs one chunk, heads first, as one matrix product per head."""
    x, log_decay, own_weight, weight, B, C, reset = tokens
    D, B_bias, C_bias, mimo_x = parameters
    size, rank, ngroups, d_state = B.shape
    nheads, headdim, _ = h.shape

    def rotate_all(
        B: Float[Array, "chunk rank ngroups d_state"], bias: Float[Array, "nheads rank d_state"]
    ) -> Float[Array, "nheads chunk rank d_state"]:
        per_head = jnp.broadcast_to(
            B.transpose(2, 0, 1, 3)[:, None], (ngroups, nheads // ngroups, size, rank, d_state)
        ).reshape(nheads, size, rank, d_state)
        return rotate(per_head + bias[:, None], cos[:, :, None], sin[:, :, None], interleaved=False)

    def flat(t: Float[Array, "nheads chunk rank last"]) -> Float[Array, "nheads rows last"]:
        return t.reshape(nheads, size * rank, -1)

    visible, sees_start = visibility(reset, size)
    decay = decays_between(log_decay.T, visible)
    since_start = keep_where(sees_start, jnp.exp(jnp.cumsum(log_decay.T, axis=1)))
    own = jnp.eye(size, dtype=bool)
    score_weight = decay * jnp.where(own, own_weight.T[:, None], weight.T[:, None])
    by_head = x.swapaxes(0, 1)[:, :, None]
    v = by_head if mimo_x is None else by_head * mimo_x[:, None]
    k, q = rotate_all(B, B_bias), rotate_all(C, C_bias)

    scores = jnp.einsum("hin,hjn->hij", flat(q), flat(k))
    # Explicit sharding allows a reshape to split one axis, or to join axes in one place.
    scores = scores.reshape(nheads, size, rank, -1).reshape(nheads, size, rank, size, rank)
    scores = scores * score_weight[:, :, None, :, None]
    scores = scores.reshape(nheads, size, rank, -1).reshape(nheads, size * rank, size * rank)
    y = jnp.einsum("hij,hjp->hip", scores, flat(v)).reshape(nheads, size, rank, headdim)
    from_start = jnp.einsum("hin,hpn->hip", flat(q), h).reshape(y.shape)
    y = y + since_start[:, :, None, None] * from_start
    if D is not None:
        y = y + D[:, None, None, None] * v

    to_end = (decay[:, -1] * weight.T)[:, :, None, None] * v
    h = since_start[:, -1, None, None] * h + jnp.einsum("hjp,hjn->hpn", flat(to_end), flat(k))
    return y.transpose(1, 2, 0, 3), h


def _in_halves(t: Float[Array, "*shape d_state"]) -> Float[Array, "*shape d_state"]:
    """Reorders pairs of neighbours: all first elements, all second ones, and an odd last one."""
    pairs, odd = jnp.split(t, [t.shape[-1] // 2 * 2], axis=-1)
    halves = pairs.reshape(*t.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(pairs.shape)
    return jnp.concatenate([halves, odd], axis=-1)


def _out_of_halves(t: Float[Array, "*shape d_state"]) -> Float[Array, "*shape d_state"]:
    """Undoes `_in_halves`."""
    halves, odd = jnp.split(t, [t.shape[-1] // 2 * 2], axis=-1)
    pairs = halves.reshape(*t.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(halves.shape)
    return jnp.concatenate([pairs, odd], axis=-1)
