"""The compiled loop behind generation: choose a token, feed it to the model, repeat."""

import dataclasses
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from ..models import LanguageModel
from ._constrained import Constrained, advance
from ._options import Options
from ._result import FinishReason, Generation
from ._state import DecodingState
from .constraints import AbstractConstraint


class Cursor(NamedTuple):
    """A position in the loop: the states of the generation and of the stop-string automaton.

    The automaton's state is not part of a `DecodingState`, since a stop string must lie within the
    tokens of one call of `generate` or `stream`.
    """

    state: DecodingState
    stop_state: Int[Array, "*batch"]
    constrained: Constrained | None = None
    """What the constraint allows next; like the automaton, it begins anew with every call."""


class Decoded(NamedTuple):
    """The generated tokens, and the state of the stop-string automaton after them."""

    out: Generation
    stop_state: Int[Array, "*batch"]
    constrained: Constrained | None = None

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.out.state, self.stop_state, self.constrained)


@eqx.filter_jit
def decode(
    model: LanguageModel,
    cursor: Cursor,
    options: Options,
    limit: Int[Array, ""],
    size: int,
    constraint: AbstractConstraint | None = None,
) -> Decoded:
    """Generates tokens for each row until the row ends.

    **Arguments:**

    - `model`: the model.
    - `cursor`: the position to start from, of one sequence or of a batch.
    - `options`: the options, with the same batch axis.
    - `limit`: the maximum number of tokens per row.
    - `size`: the size of the output buffers, at least `limit`. Another value recompiles.
    - `constraint`: the constraint of all rows, whose state is in `cursor`. For a constraint of
        the host, this is `None` and `limit` is 1.

    **Returns:**

    The generated tokens in buffers of `size`, with the state of the automaton.
    """

    def is_running(now: Decoded) -> Bool[Array, "*batch"]:
        return (now.out.length < limit) & (now.out.finish == FinishReason.LENGTH)

    def empty(state: DecodingState, constrained: Constrained | None) -> Generation:
        finish = jnp.zeros((), jnp.int32)
        if constrained is not None:
            finish = jnp.where(constrained.over, jnp.int32(FinishReason.NO_TOKEN), finish)
        return Generation(
            tokens=jnp.full(size, -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            log_probs=jnp.zeros(size, jnp.float32),
            finish=finish,
            state=state,
        )

    def next_token(now: Decoded, options: Options) -> Decoded:
        out, state = now.out, now.out.state
        logits, layers = model.step(state.token, state.layers)
        logits = logits[: model.vocab_size]
        constrained = now.constrained
        allowed = None if constrained is None else constrained.allowed
        token = options.choose(logits, state.recent, state.position, allowed)
        log_z = jax.nn.logsumexp(logits)
        log_prob = logits[token] - log_z
        # One logit that is NaN or infinite makes the sum so; minus infinity is the logit of a token
        # that the model excludes.
        is_finite = jnp.isfinite(log_z)
        if allowed is not None:  # The model may exclude every token that is allowed.
            is_finite &= allowed[token]
        stop_state, finish = options.stopping.advance(now.stop_state, token)
        finish = jnp.where(is_finite, finish, jnp.asarray(FinishReason.NOT_FINITE, jnp.int32))
        if constraint is not None and constrained is not None:
            constrained = advance(constraint, constrained, token, options.bias)
            ends = constrained.over & (finish == FinishReason.LENGTH)
            finish = jnp.where(ends, jnp.int32(FinishReason.NO_TOKEN), finish)
        recent = jnp.concatenate([state.recent[1:], token[None]])
        out = Generation(
            tokens=out.tokens.at[out.length].set(jnp.where(is_finite, token, -1)),
            length=out.length + is_finite.astype(jnp.int32),
            log_probs=out.log_probs.at[out.length].set(
                jnp.where(is_finite, log_prob, jnp.zeros_like(log_prob)).astype(jnp.float32)
            ),
            finish=finish,
            state=DecodingState(layers, token, state.position + 1, recent),
        )
        return Decoded(out, stop_state, constrained)

    if cursor.state.token.ndim == 0:
        first = empty(cursor.state, cursor.constrained)
        start = Decoded(first, cursor.stop_state, cursor.constrained)
        return lax.while_loop(is_running, lambda now: next_token(now, options), start)

    # A `vmap` of the loop, or any selection between a row's new and old state after every token,
    # would copy the states of all rows each time. Instead, a row's final state is saved when the
    # row ends; later updates of that row are discarded.

    def select(rows: Bool[Array, " batch"], new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(rows, a, b), new, old)

    def next_tokens(now: Decoded) -> Decoded:
        then = jax.vmap(next_token, in_axes=(0, options.row_axes()))(now, options)
        layers = then.out.state.layers
        then = select(is_running(now), _replace_layers(then, None), _replace_layers(now, None))
        return _replace_layers(then, layers)

    def until_one_ends(carry: tuple[Decoded, PyTree]) -> tuple[Decoded, PyTree]:
        now, final_layers = carry
        running = is_running(now)
        now = lax.while_loop(lambda now: jnp.all(is_running(now) == running), next_tokens, now)
        ended = running & ~is_running(now)
        return now, select(ended, now.out.state.layers, final_layers)

    first = jax.vmap(empty)(cursor.state, cursor.constrained)
    start = Decoded(first, cursor.stop_state, cursor.constrained)
    end, layers = lax.while_loop(
        lambda carry: jnp.any(is_running(carry[0])), until_one_ends, (start, cursor.state.layers)
    )
    return _replace_layers(end, layers)


def _replace_layers(now: Decoded, layers: PyTree) -> Decoded:
    state = dataclasses.replace(now.out.state, layers=layers)
    return now._replace(out=dataclasses.replace(now.out, state=state))


_Result = TypeVar("_Result", bound=PyTree)


def trim(out: _Result, size: int) -> _Result:
    """Trims a result's `tokens` and `log_probs` from the compiled size to the requested one."""
    where = lambda out: (out.tokens, out.log_probs)
    return eqx.tree_at(where, out, replace_fn=lambda buffer: buffer[..., :size])
