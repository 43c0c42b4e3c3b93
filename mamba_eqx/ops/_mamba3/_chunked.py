from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._chunks import cut_into_chunks, decays, documents, only
from .._rotary import cos_sin, rotate, wrap
from ._step import expanded, turned
from ._types import Parameters, State, Tokens


# Subscripts: l, s tokens (of output and input), h heads, r ranks, p channels of a head, n state
# dimensions, a angles, c chunks; i, j the outputs and the inputs of a chunk, over tokens and ranks.


def chunked(
    chunk_size: int,
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    reset: Bool[Array, " seq"] | None,
    real: Bool[Array, " seq"] | None,
    interleaved: bool,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    """Chunk after chunk, the last one filled with tokens of `dt = 0`."""
    x, dt, A, B, C, trap, angles = tokens
    D, B_bias, C_bias, mimo_x = parameters
    finite = _finite_heads(state)
    if reset is not None:
        # What is not a number would get into all products of its chunk, even beyond a reset. It is
        # put back at the end, where it belongs.
        state = _only_heads(finite & ~reset[0], state, 0.0)
    angle, h, k, x_before = state
    cos, sin, angle = _cos_sin_of_chunks(chunk_size, dt, angles, angle, reset)

    # Each chunk gets the state with the terms of the token before it, up to that token's decay.
    gamma = trap * dt
    late = (1 - trap) * dt
    pending = jnp.einsum("rhn,rhp->hpn", late[0, :, None] * k, expanded(x_before, mimo_x))
    later = jnp.concatenate([late[1:], jnp.zeros_like(late[:1])])

    # With the pairs in the two halves all that is turned is contiguous.
    order = _in_halves if interleaved else lambda t: t
    per_token = (x, dt * A, gamma, gamma + later, order(B), order(C), reset)
    in_halves = Parameters(D, order(B_bias), order(C_bias), mimo_x)

    # `prevent_cse` is for code outside of loops.
    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(h: Array, tokens: Any) -> tuple[Array, Array]:
        cos, sin, x, logs, gamma, scale, B, C, reset = tokens
        y, h = _chunk(cos, sin, x, logs, gamma, scale, B, C, reset, in_halves, h)
        return h, y

    chunks = (cos, sin, *cut_into_chunks(chunk_size, per_token))
    h, y = lax.scan(chunk, order(h + pending), chunks)
    h = _out_of_halves(h) if interleaved else h

    # The key and the value of the last real token, if there is one.
    seq = x.shape[0]
    length = seq if real is None else jnp.sum(real)
    B_last, x_last = (
        lax.dynamic_index_in_dim(t, jnp.maximum(length - 1, 0), keepdims=False) for t in (B, x)
    )
    k = jnp.where(length > 0, turned(B_last, B_bias, angle, interleaved), k)
    x = jnp.where(length > 0, x_last, x_before)
    y, state = y.reshape(-1, *y.shape[2:])[:seq], (angle, h, k, x)
    if reset is not None:
        lost = ~finite & (jnp.cumsum(reset) == 0)[:, None]
        y = jnp.where(lost[:, None, :, None], jnp.nan, y)
        state = _only_heads(~lost[-1], state, jnp.nan)
    return y, state


def _finite_heads(state: State) -> Bool[Array, " nheads"]:
    angle, h, k, x = (jnp.isfinite(t) for t in state)
    return angle.all(axis=1) & h.all(axis=(1, 2)) & k.all(axis=(0, 2)) & x.all(axis=1)


def _only_heads(mask: Bool[Array, " nheads"], state: State, otherwise: float) -> State:
    angle, h, k, x = state
    angle, k, x = (jnp.where(mask[:, None], t, otherwise) for t in (angle, k, x))
    return angle, jnp.where(mask[:, None, None], h, otherwise), k, x


def _cos_sin_of_chunks(
    chunk_size: int,
    dt: Float[Array, "seq nheads"],
    angles: Float[Array, "seq pairs"],
    angle: Float[Array, "nheads pairs"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[
    Float[Array, "chunks nheads chunk pairs"],
    Float[Array, "chunks nheads chunk pairs"],
    Float[Array, "nheads pairs"],
]:
    """Of the angle at every token, and the last angle.

    Angles are summed within chunks, and from chunk to chunk modulo a turn: a sum over a long
    sequence would leave no digits for the angle.
    """
    dt, angles, reset = cut_into_chunks(chunk_size, (dt, angles, reset))
    if reset is None:
        visible, first = documents(None, dt.shape[1])
        subscripts = "ls,csha->chla"
    else:
        visible, first = jax.vmap(lambda reset: documents(reset, dt.shape[1]))(reset)
        subscripts = "cls,csha->chla"
    turns = wrap(dt[..., None] * angles[:, :, None])
    within = jnp.einsum(
        subscripts, visible.astype(turns.dtype), turns, precision=lax.Precision.HIGHEST
    )
    first = jnp.broadcast_to(first, dt.shape[:2])

    def chunk(angle: Array, totals: Any) -> tuple[Array, Array]:
        last, through = totals
        return wrap(last + only(through, angle)), angle

    angle, starts = lax.scan(chunk, angle, (within[:, :, -1], first[:, -1]))
    starts = jnp.where(first[:, None, :, None], starts[:, :, None], 0)
    return *cos_sin(wrap(within + starts)), angle


def _chunk(
    cos: Float[Array, "nheads chunk pairs"],
    sin: Float[Array, "nheads chunk pairs"],
    x: Float[Array, "chunk nheads headdim"],
    logs: Float[Array, "chunk nheads"],
    gamma: Float[Array, "chunk nheads"],
    scale: Float[Array, "chunk nheads"],
    B: Float[Array, "chunk rank ngroups d_state"],
    C: Float[Array, "chunk rank ngroups d_state"],
    reset: Bool[Array, " chunk"] | None,
    parameters: Parameters,
    h: Float[Array, "nheads headdim d_state"],
) -> tuple[Float[Array, "chunk rank nheads headdim"], Float[Array, "nheads headdim d_state"]]:
    """One chunk, heads first: products of matrices, one for each head."""
    D, B_bias, C_bias, mimo_x = parameters
    size, rank, ngroups, d_state = B.shape
    nheads, headdim, _ = h.shape

    def all_turned(
        B: Float[Array, "chunk rank ngroups d_state"], bias: Float[Array, "nheads rank d_state"]
    ) -> Float[Array, "nheads chunk rank d_state"]:
        of_heads = jnp.broadcast_to(
            B.transpose(2, 0, 1, 3)[:, None], (ngroups, nheads // ngroups, size, rank, d_state)
        ).reshape(nheads, size, rank, d_state)
        return rotate(of_heads + bias[:, None], cos[:, :, None], sin[:, :, None], interleaved=False)

    def flat(t: Float[Array, "nheads chunk rank last"]) -> Float[Array, "nheads rows last"]:
        return t.reshape(nheads, size * rank, -1)

    visible, first = documents(reset, size)
    decay = decays(logs.T, visible)
    since_start = only(first, jnp.exp(jnp.cumsum(logs.T, axis=1)))
    own = jnp.eye(size, dtype=bool)
    weight = decay * jnp.where(own, gamma.T[:, None], scale.T[:, None])
    by_head = x.swapaxes(0, 1)[:, :, None]
    v = by_head if mimo_x is None else by_head * mimo_x[:, None]
    k, q = all_turned(B, B_bias), all_turned(C, C_bias)

    scores = jnp.einsum("hin,hjn->hij", flat(q), flat(k)).reshape(nheads, size, rank, size, rank)
    scores = (scores * weight[:, :, None, :, None]).reshape(nheads, size * rank, size * rank)
    y = jnp.einsum("hij,hjp->hip", scores, flat(v)).reshape(nheads, size, rank, headdim)
    seen = jnp.einsum("hin,hpn->hip", flat(q), h).reshape(y.shape)
    y = y + since_start[:, :, None, None] * seen
    if D is not None:
        y = y + D[:, None, None, None] * v

    to_end = (decay[:, -1] * scale.T)[:, :, None, None] * v
    h = since_start[:, -1, None, None] * h + jnp.einsum("hjp,hjn->hpn", flat(to_end), flat(k))
    return y.transpose(1, 2, 0, 3), h


def _in_halves(t: Float[Array, "*shape d_state"]) -> Float[Array, "*shape d_state"]:
    """The pairs of neighbours, apart: every first one, every second one, and an odd one."""
    pairs, odd_one = jnp.split(t, [t.shape[-1] // 2 * 2], axis=-1)
    halves = pairs.reshape(*t.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(pairs.shape)
    return jnp.concatenate([halves, odd_one], axis=-1)


def _out_of_halves(t: Float[Array, "*shape d_state"]) -> Float[Array, "*shape d_state"]:
    """The inverse of `_in_halves`."""
    halves, odd_one = jnp.split(t, [t.shape[-1] // 2 * 2], axis=-1)
    pairs = halves.reshape(*t.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(halves.shape)
    return jnp.concatenate([pairs, odd_one], axis=-1)
