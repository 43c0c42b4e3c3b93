"""The compiled loop behind generation: a token chosen, fed to the model, and so on."""

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ..models import LanguageModel
from ._options import Choice
from ._result import FinishReason, Generation
from ._state import DecodingState


@eqx.filter_jit
def decode(
    model: LanguageModel,
    state: DecodingState,
    choice: Choice,
    stop_table: Int[Array, "states vocab"] | None,
    matched: Int[Array, "*batch"],
    key: PyTree[Array],
    limit: Int[Array, ""],
    size: int,
) -> tuple[Generation, Int[Array, "*batch"]]:
    """At most `limit` tokens, in buffers of `size`; with a batch, a key for each row. `matched` is
    the state of the automaton of `stop_table`."""

    def go_on(carry: tuple[Generation, Array]) -> Bool[Array, "*batch"]:
        out, _ = carry
        return (out.lengths < limit) & (out.finish == FinishReason.LENGTH)

    def begin(state: DecodingState) -> Generation:
        return Generation(
            tokens=jnp.full(size, -1, jnp.int32),
            lengths=jnp.zeros((), jnp.int32),
            log_probs=jnp.zeros(size, jnp.float32),
            finish=jnp.zeros((), jnp.int32),
            state=state,
        )

    def row(
        carry: tuple[Generation, Array], choice: Choice, key: PRNGKeyArray | None
    ) -> tuple[Generation, Array]:
        out, matched = carry
        now, i = out.state, out.lengths
        logits, layers = model.step(now.token, now.layers)
        logits = logits[: model.vocab_size]
        token_key = None if key is None else jr.fold_in(key, now.position)
        token = choice.choose(logits, now.recent, token_key)
        log_prob = logits[token] - jax.nn.logsumexp(logits)
        finish = jnp.where(jnp.any(token == choice.stop_tokens), FinishReason.STOP_TOKEN, 0)
        if stop_table is not None:
            matched = stop_table[matched, token]
            ended = matched == len(stop_table) - 1
            finish = jnp.where((finish == 0) & ended, FinishReason.STOP_STRING, finish)
        recent = jnp.concatenate([now.recent[1:], token[None]])
        out = Generation(
            tokens=out.tokens.at[i].set(token),
            lengths=i + 1,
            log_probs=out.log_probs.at[i].set(log_prob.astype(jnp.float32)),
            finish=finish.astype(jnp.int32),
            state=DecodingState(layers, token, now.position + 1, recent),
        )
        return out, matched

    if state.token.ndim == 0:
        return lax.while_loop(go_on, lambda carry: row(carry, choice, key), (begin(state), matched))

    # Of a batch. A `vmap` of the loop, or any choice between a row's new and old state after every
    # token, would copy all states every time. So the states of ended rows are put aside when they
    # end, and what becomes of them then is of no interest.

    def where(rows: Bool[Array, " batch"], new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(rows, a, b), new, old)

    def all_rows(carry: tuple[Generation, Array]) -> tuple[Generation, Array]:
        out, matched = jax.vmap(row)(carry, choice, key)
        layers = out.state.layers
        new, old = _with_layers(out, None), _with_layers(carry[0], None)
        out, matched = where(go_on(carry), (new, matched), (old, carry[1]))
        return _with_layers(out, layers), matched

    def until_one_ends(
        carry: tuple[tuple[Generation, Array], PyTree],
    ) -> tuple[tuple[Generation, Array], PyTree]:
        inner, ended_layers = carry
        going = go_on(inner)
        inner = lax.while_loop(lambda inner: jnp.all(go_on(inner) == going), all_rows, inner)
        ended = going & ~go_on(inner)
        return inner, where(ended, inner[0].state.layers, ended_layers)

    first = (jax.vmap(begin)(state), matched)
    (out, matched), layers = lax.while_loop(
        lambda carry: jnp.any(go_on(carry[0])), until_one_ends, (first, state.layers)
    )
    return _with_layers(out, layers), matched


def _with_layers(out: Generation, layers: PyTree) -> Generation:
    return dataclasses.replace(out, state=dataclasses.replace(out.state, layers=layers))


_Buffers = TypeVar("_Buffers", bound=PyTree)


def cut(out: _Buffers, size: int) -> _Buffers:
    """What a loop returned, its buffers cut from the size that was compiled to the one wanted."""
    where = lambda out: (out.tokens, out.log_probs)  # noqa: E731
    return eqx.tree_at(where, out, replace_fn=lambda buffer: buffer[..., :size])
