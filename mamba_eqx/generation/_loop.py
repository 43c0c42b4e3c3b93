"""The compiled loop behind generation: a token chosen, fed to the model, and so on."""

import dataclasses
import enum
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._choice import Choice
from ._language_model import LanguageModel
from ._prompts import WINDOW, DecodingState
from ._protocol import repeated, with_room


_CHUNK = 512  # the most tokens of a prompt that are run at once; a power of two
_BUCKET = 16  # the smallest size that is compiled, for prompts and for outputs
_HEADS = 64  # the most tokens whose logits are held at once while scoring


class FinishReason(enum.IntEnum):
    """Why a row of a [`mamba_eqx.Generation`][] ended."""

    LENGTH = 0
    """At `max_new_tokens`."""
    STOP_TOKEN = 1
    STOP_STRING = 2


class Generation(eqx.Module):
    """What [`mamba_eqx.generate`][] returns. For one prompt there is no batch axis.

    - `tokens`: the new tokens, without the prompt. A stop token that ended a row is its last one.
        After the end there is padding of -1, which is no token.
    - `lengths`: how many of them are real.
    - `log_probs`: the logarithm of the probability that the model itself gave to each token, that
        is without temperature, filters, penalties and bias, among the `vocab_size` tokens. 0 after
        the end.
    - `finish`: why each row ended, a [`mamba_eqx.FinishReason`][].
    - `state`: to go on from here, `generate(model, None, n, state=generation.state)`.
    """

    tokens: Int[Array, "*batch new"]
    lengths: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    finish: Int[Array, "*batch"]
    state: DecodingState

    @property
    def stopped(self) -> Bool[Array, "*batch"]:
        """Whether a row ended by itself, rather than at `max_new_tokens`."""
        return self.finish != FinishReason.LENGTH


@eqx.filter_jit
def _empty(model: LanguageModel, rows: int | None, max_len: int) -> PyTree:
    layers = model.init_state(max_len=max_len)
    return layers if rows is None else repeated(layers, rows)


@eqx.filter_jit
def _prefill(
    model: LanguageModel,
    layers: PyTree,
    tokens: Int[Array, "*batch seq"],
    targets: Int[Array, "*batch seq"] | None,
    lengths: Int[Array, "*batch"],
) -> tuple[Float[Array, "*batch seq"] | None, PyTree]:
    """The state after a piece of the prompts, and the log-probabilities of what comes next."""

    def row(
        layers: PyTree, tokens: Array, targets: Array | None, length: Array
    ) -> tuple[Array | None, PyTree]:
        features, layers = model.backbone(tokens, layers, length=length)
        return None if targets is None else _log_probs(model, features, targets), layers

    return (row if tokens.ndim == 1 else jax.vmap(row))(layers, tokens, targets, lengths)


def _log_probs(
    model: LanguageModel, features: Float[Array, "seq d_model"], targets: Int[Array, " seq"]
) -> Float[Array, " seq"]:
    def one(feature_and_target: tuple[Array, Array]) -> Array:
        feature, target = feature_and_target
        logits = model.logits(feature)[: model.vocab_size]
        return (logits[target] - jax.nn.logsumexp(logits)).astype(jnp.float32)

    # A few at a time: the logits of all of them would be the largest array of all.
    return lax.map(one, (features, targets), batch_size=_HEADS)


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


def start(
    model: LanguageModel,
    rows: list[np.ndarray],
    batched: bool,
    state: DecodingState | None,
    *,
    room: int = 0,
    window: int = 1,
) -> DecodingState:
    """The state after the prompts: all but the last token of each row are run.

    **Arguments:**

    - `room`: for how many more tokens a cache must have room.
    - `window`: how many of the last tokens are needed.
    """
    return run(model, rows, batched, state, room=room, window=window, score=False)[0]


def run(
    model: LanguageModel,
    rows: list[np.ndarray],
    batched: bool,
    state: DecodingState | None,
    *,
    room: int,
    window: int,
    score: bool,
) -> tuple[DecodingState, list[np.ndarray]]:
    """As `start`; and, if they are wanted, the log-probabilities of all tokens but the first of
    each row (after a `state`: of all)."""
    count = len(rows)
    if state is None:
        longest = max(map(len, rows)) + room
        layers = _empty(model, count if batched else None, bucket(longest))
        position = np.zeros(count, np.int32)
        before = [np.full(max(window, WINDOW), -1, np.int32)] * count
    else:
        position = np.asarray(state.position).reshape(-1)
        pending = np.asarray(state.token).reshape(-1, 1)
        before = list(np.asarray(state.recent).reshape(count, -1)[:, :-1])
        rows = [np.concatenate(pair) for pair in zip(pending, rows, strict=True)]
        longest = max(at + len(row) for at, row in zip(position.tolist(), rows, strict=True))
        layers = with_room(state.layers, bucket(longest + room))
        if state.recent.shape[-1] < window:
            raise ValueError(
                f"The `penalties` look at the last {window} tokens, but the `state` given has kept "
                f"{state.recent.shape[-1]} of them. Give the same `penalties` when it is made."
            )
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    whole = longest // _CHUNK * _CHUNK
    padded = np.zeros((count, whole + bucket(longest - whole) + 1), np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row

    def shaped(values: np.ndarray) -> Array:
        return jnp.asarray(values if batched else values[0], jnp.int32)

    pieces = []
    for at in range(0, longest, _CHUNK):
        piece = padded[:, at : at + _CHUNK + 1]
        left = shaped(np.clip(lengths - at, 0, _CHUNK))
        targets = shaped(piece[:, 1:]) if score else None
        log_probs, layers = _prefill(model, layers, shaped(piece[:, :-1]), targets, left)
        pieces.append(log_probs)
    scored = []
    if score:
        pieces = [np.asarray(piece).reshape(count, -1) for piece in pieces]
        joined = np.concatenate([np.zeros((count, 0), np.float32), *pieces], axis=1)
        scored = [row[:length] for row, length in zip(joined, lengths, strict=True)]
    size = len(before[0]) + (state is not None)
    recent = [np.concatenate(pair)[-size:] for pair in zip(before, rows, strict=True)]
    last = np.array([row[-1] for row in rows], np.int32)
    state = DecodingState(
        layers, shaped(last), shaped(position + lengths), shaped(np.array(recent, np.int32))
    )
    return state, scored


_Buffers = TypeVar("_Buffers", bound=PyTree)


def cut(out: _Buffers, size: int) -> _Buffers:
    """What a loop returned, its buffers cut from the size that was compiled to the one wanted."""
    where = lambda out: (out.tokens, out.log_probs)  # noqa: E731
    return eqx.tree_at(where, out, replace_fn=lambda buffer: buffer[..., :size])


def bucket(size: int) -> int:
    """The next power of two: what is compiled, for sizes up to it."""
    return max(_BUCKET, 1 << (size - 1).bit_length())
