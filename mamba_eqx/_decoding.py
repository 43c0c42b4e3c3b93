"""The compiled loop behind generation: a token chosen, fed to the model, and so on."""

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from . import _sampling
from ._language_model import LanguageModel
from ._penalties import (
    Penalties,
    frequency_penalty,
    presence_penalty,
    read_bias,
    repetition_penalty,
)
from ._prompts import DecodingState, check_tokens


_CHUNK = 512  # the most tokens of a prompt that are run at once; a power of two
_BUCKET = 16  # the smallest size that is compiled, for prompts and for outputs
_WINDOW = 64  # the fewest last tokens that a state keeps


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


class Choice(eqx.Module):
    """How a token is chosen and when a row ends. The values are arrays, so that only turning an
    option on or off recompiles. A temperature of `None` is greedy, as is one of 0 in a row."""

    temperature: Float[Array, "*batch"] | None
    top_k: Int[Array, "*batch"] | None
    top_p: Float[Array, "*batch"] | None
    min_p: Float[Array, "*batch"] | None
    typical_p: Float[Array, "*batch"] | None
    repetition: Float[Array, "*batch"] | None
    presence: Float[Array, "*batch"] | None
    frequency: Float[Array, "*batch"] | None
    bias: Float[Array, "*batch vocab"] | None
    stop_tokens: Int[Array, "*batch stop"]
    window: int = eqx.field(static=True)
    some_greedy: bool = eqx.field(static=True)

    def logits(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        """After penalties and bias, on which greedy decoding depends as well."""
        if self.repetition is not None and self.presence is not None:
            recent = recent[-self.window :]
            logits = repetition_penalty(logits, recent, self.repetition)
            logits = presence_penalty(logits, recent, self.presence)
        if self.frequency is not None:
            logits = frequency_penalty(logits, recent[-self.window :], self.frequency)
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)

    def distribution(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        """The logits from which a token is drawn: of greedy decoding, `-inf` for all but one."""
        logits = self.logits(logits, recent)
        if self.temperature is None:
            return _only_best(logits)
        temperature = self.temperature
        if self.some_greedy:
            temperature = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        filtered = _sampling.filtered(
            logits,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
        )
        if self.some_greedy:
            greedy = _only_best(logits.astype(filtered.dtype))
            filtered = jnp.where(self.temperature > 0, filtered, greedy)
        return filtered

    def choose(
        self,
        logits: Float[Array, " vocab"],
        recent: Int[Array, " window"],
        key: PRNGKeyArray | None,
    ) -> Int[Array, ""]:
        if self.temperature is None or key is None:
            return _sampling.greedy(self.logits(logits, recent))
        return _sampling.draw(self.distribution(logits, recent), key)


def _only_best(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    best = jnp.arange(logits.shape[0]) == jnp.argmax(logits)
    return jnp.where(best, jnp.zeros_like(logits), jnp.full_like(logits, -jnp.inf))


def read_choice(
    model: LanguageModel,
    rows: int | None,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    typical_p: Any,
    penalties: Penalties | None,
    logit_bias: Mapping[int, float] | Array | np.ndarray | None,
    stop_tokens: Any,
    key: Any,
) -> Choice:
    """The options of a generation, checked. With a batch, one of each for every row."""
    bias = read_bias(model.vocab_size, logit_bias)
    value = functools.partial(_option, rows)
    heat = np.asarray(value("temperature", temperature, _check_heat, np.float32))
    if (heat > 0).any():
        if key is None:
            raise ValueError(
                f"Sampling with temperature={temperature} needs a key: give "
                "`key=jax.random.key(0)`, or `temperature=0` for greedy decoding."
            )
        if not _is_key(key):
            raise ValueError(f"`key` must be one key made by `jax.random.key`, but got {key!r}.")
    filters = (
        value("top_k", top_k, _sampling.check_top_k, np.int64),
        value("top_p", top_p, _sampling.check_top_p, np.float32),
        value("min_p", min_p, _sampling.check_min_p, np.float32),
        value("typical_p", typical_p, _sampling.check_typical_p, np.float32),
    )
    if (heat == 0).all():
        heat, filters = None, (None, None, None, None)
    k, *shares = filters
    if penalties is None:
        repetition = presence = frequency = None
    else:
        repetition, presence, frequency = (
            value(name, getattr(penalties, name), None, np.float32)
            for name in ("repetition", "presence", "frequency")
        )
    if bias is not None and rows is not None:
        bias = np.broadcast_to(bias, (rows, len(bias)))
    arrays = jax.tree.map(
        jnp.asarray,
        (
            heat,
            None if k is None else np.minimum(k, model.vocab_size).astype(np.int32),
            *shares,
            repetition,
            presence,
            frequency,
            bias,
            _read_stop_tokens(model.vocab_size, rows, stop_tokens),
        ),
    )
    return Choice(
        *arrays,
        window=1 if penalties is None else penalties.window,
        some_greedy=heat is not None and bool((heat == 0).any()),
    )


def _option(
    rows: int | None, name: str, value: Any, check: Callable[[Any], None] | None, dtype: Any
) -> np.ndarray | None:
    if value is None:
        return None
    each = np.asarray(value)
    if each.ndim == 0:
        if check is not None:
            check(value)
    elif rows is None or each.shape != (rows,):
        wanted = "one number" if rows is None else f"one number, or one for each of {rows} rows"
        raise ValueError(f"`{name}` must be {wanted}, but got an array of shape {each.shape}.")
    elif check is not None:
        for one in each:
            check(one)
    each = each.astype(dtype)
    return each if rows is None else np.broadcast_to(each, (rows,))


def _check_heat(value: Any) -> None:
    if isinstance(value, bool | str) or value != 0:
        _sampling.check_temperature(value)


def _read_stop_tokens(vocab_size: int, rows: int | None, tokens: Any) -> np.ndarray:
    nested = isinstance(tokens, Sequence) and len(tokens) > 0 and np.ndim(tokens[0]) > 0
    if not nested:
        one = check_tokens(vocab_size, "stop_tokens", tokens)
        return one if rows is None else np.broadcast_to(one, (rows, len(one)))
    if rows is None or len(tokens) != rows:
        raise ValueError(
            "`stop_tokens` must be a list of tokens, or one such list for each row, but got "
            f"{len(tokens)} lists for {'one prompt' if rows is None else f'{rows} rows'}."
        )
    each = [check_tokens(vocab_size, f"stop_tokens[{i}]", row) for i, row in enumerate(tokens)]
    padded = np.full((rows, max(map(len, each))), -1, np.int32)
    for padded_row, row in zip(padded, each, strict=True):
        padded_row[: len(row)] = row
    return padded


def _is_key(key: Any) -> bool:
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.ndim == 1 and key.dtype == jnp.uint32


@eqx.filter_jit
def _empty(model: LanguageModel, rows: int | None, max_len: int) -> PyTree:
    layers = model.init_state(max_len=max_len)
    if rows is None:
        return layers
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), layers)


@eqx.filter_jit
def _prefill(
    model: LanguageModel,
    layers: PyTree,
    tokens: Int[Array, "*batch seq"],
    lengths: Int[Array, "*batch"],
) -> PyTree:
    def row(layers: PyTree, tokens: Array, length: Array) -> PyTree:
        return model.backbone(tokens, layers, length=length)[1]

    return (row if tokens.ndim == 1 else jax.vmap(row))(layers, tokens, lengths)


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

    def go_on(carry: tuple[Generation, Array]) -> Bool[Array, ""]:
        out, _ = carry
        return (out.lengths < limit) & (out.finish == FinishReason.LENGTH)

    def row(
        state: DecodingState, choice: Choice, matched: Array, key: PRNGKeyArray | None
    ) -> tuple[Generation, Array]:
        def body(carry: tuple[Generation, Array]) -> tuple[Generation, Array]:
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

        out = Generation(
            tokens=jnp.full(size, -1, jnp.int32),
            lengths=jnp.zeros((), jnp.int32),
            log_probs=jnp.zeros(size, jnp.float32),
            finish=jnp.zeros((), jnp.int32),
            state=state,
        )
        return lax.while_loop(go_on, body, (out, matched))

    # Under `vmap` the loop runs until every row has ended, and rows that have keep their value.
    return (row if state.token.ndim == 0 else jax.vmap(row))(state, choice, matched, key)


def start(
    model: LanguageModel,
    rows: list[np.ndarray],
    batched: bool,
    state: DecodingState | None,
    max_new_tokens: int,
    window: int,
) -> DecodingState:
    """The state after the prompts: all but the last token of each row are run."""
    count = len(rows)
    if state is None:
        longest = max(map(len, rows)) + max_new_tokens
        layers = _empty(model, count if batched else None, bucket(longest))
        position = np.zeros(count, np.int32)
        before = [np.full(max(window, _WINDOW), -1, np.int32)] * count
    else:
        layers = state.layers
        position = np.asarray(state.position).reshape(-1)
        pending = np.asarray(state.token).reshape(-1, 1)
        before = list(np.asarray(state.recent).reshape(count, -1)[:, :-1])
        rows = [np.concatenate(pair) for pair in zip(pending, rows, strict=True)]
        if state.recent.shape[-1] < window:
            raise ValueError(
                f"The `penalties` look at the last {window} tokens, but the `state` given has kept "
                f"{state.recent.shape[-1]} of them. Give the same `penalties` when it is made."
            )
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    whole = longest // _CHUNK * _CHUNK
    padded = np.zeros((count, whole + bucket(longest - whole)), np.int32)
    for padded_row, row, length in zip(padded, rows, lengths, strict=True):
        padded_row[:length] = row[:-1]

    def shaped(values: np.ndarray) -> Array:
        return jnp.asarray(values if batched else values[0], jnp.int32)

    for at in range(0, longest, _CHUNK):
        tokens = shaped(padded[:, at : at + _CHUNK])
        layers = _prefill(model, layers, tokens, shaped(np.clip(lengths - at, 0, _CHUNK)))
    size = len(before[0]) + (state is not None)
    recent = [np.concatenate(pair)[-size:] for pair in zip(before, rows, strict=True)]
    last = np.array([row[-1] for row in rows], np.int32)
    return DecodingState(
        layers, shaped(last), shaped(position + lengths), shaped(np.array(recent, np.int32))
    )


def bucket(size: int) -> int:
    """The next power of two: what is compiled, for sizes up to it."""
    return max(_BUCKET, 1 << (size - 1).bit_length())
