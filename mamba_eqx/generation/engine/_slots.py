"""The compiled part of the engine: the rows of a batch that decode together.

The number of rows is a power of two. Everything here is compiled once for each number of rows, and
again when a request first uses a kind of option (`Kinds`), of which there are few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from ...models import LanguageModel
from .._options import Options
from .._result import FinishReason
from .._state import DecodingState
from .._stopping import Stopping
from ..sampling import Filters, Penalties


RUNNING = -1
"""The value of `Block.finish` of a row that continues."""
TOP = 20
"""The number of most likely tokens that can be returned with each token."""


class Kinds(NamedTuple):
    """The kinds of options that requests have used so far.

    Options have arrays for these kinds only, since an unused filter takes time with every token.
    Kinds are only ever added, so that programs are compiled a few times at most.
    """

    filters: tuple[tuple[bool, bool, bool], ...] = ()
    """Whether sampled rows filter by `top_k`, `top_p` and `typical_p`, in every combination used.
    (A `min_p` of 0 changes no token, unlike neutral values of these, which take other random
    numbers than no filter at all.)"""
    penalties: bool = False
    bias: bool = False
    top: bool = False
    """Whether rows want the most likely tokens."""
    stops: int = 4
    """The number of stop tokens."""

    def union(self, other: "Kinds") -> "Kinds":
        filters = tuple(sorted({*self.filters, *other.filters}))
        return Kinds(
            filters,
            self.penalties or other.penalties,
            self.bias or other.bias,
            self.top or other.top,
            max(self.stops, other.stops),
        )


class RowOptions(NamedTuple):
    """The options of one row, in NumPy. Neutral numbers stand for options that are not set."""

    kind: tuple[bool, bool, bool] | None
    """An element of `Kinds.filters`, or `None` for greedy decoding."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    penalties: tuple[float, float, float]
    window: int
    bias: np.ndarray | None
    stops: np.ndarray
    key: np.ndarray | None
    top: bool
    end: int
    """The position at which the row has all its tokens."""

    def kinds(self) -> Kinds:
        """Returns the kinds that these options use."""
        count = max(4, 1 << (len(self.stops) - 1).bit_length()) if len(self.stops) else 4
        filters = () if self.kind is None else (self.kind,)
        return Kinds(
            filters, self.penalties != NO_PENALTIES, self.bias is not None, self.top, count
        )


NO_PENALTIES = (1.0, 0.0, 0.0)


class Choice(eqx.Module):
    """The options of all rows as arrays. A row without a request has those of greedy decoding."""

    kinds: Kinds = eqx.field(static=True)
    kind: Int[Array, " rows"]
    """The index in `kinds.filters`, or -1 for greedy decoding."""
    temperature: Float[Array, " rows"]
    filters: Filters
    penalties: Float[Array, "rows 3"]
    window: Int[Array, " rows"]
    bias: Float[Array, "rows vocab"] | None
    stops: Int[Array, "rows stop"]
    key: UInt32[Array, "rows key"]
    top: Bool[Array, " rows"]
    end: Int[Array, " rows"]

    def choose(
        self,
        logits: Float[Array, "rows vocab"],
        recent: Int[Array, "rows window"],
        position: Int[Array, " rows"],
        running: Bool[Array, " rows"],
        allowed: Bool[Array, "rows vocab"] | None,
    ) -> Int[Array, " rows"]:
        """Chooses the next token of each row, exactly as `Options.choose` does for a row alone."""
        age = jnp.arange(recent.shape[1], 0, -1)
        recent = jnp.where(age <= self.window[:, None], recent, -1)
        rows = (logits, recent, position, allowed)
        token = jax.vmap(Options.choose)(self._options(None), *rows)
        for i, kind in enumerate(self.kinds.filters):
            mine = running & (self.kind == i)

            def sampled(
                token: Array, mine: Array = mine, kind: tuple[bool, bool, bool] = kind
            ) -> Array:
                return jnp.where(mine, jax.vmap(Options.choose)(self._options(kind), *rows), token)

            token = lax.cond(jnp.any(mine), sampled, lambda token: token, token)
        return token

    def _options(self, kind: tuple[bool, bool, bool] | None) -> Options:
        """Returns the options of all rows as if all were of one kind."""
        penalties = None
        if self.kinds.penalties:
            columns = (self.penalties[:, i] for i in range(3))
            penalties = Penalties(*columns, window=1 << 30)  # `recent` is cut already.
        filters = Filters()
        if kind is not None:
            top_k, top_p, typical_p = kind
            filters = Filters(
                self.filters.top_k if top_k else None,
                self.filters.top_p if top_p else None,
                self.filters.min_p,
                self.filters.typical_p if typical_p else None,
            )
        return Options(
            temperature=None if kind is None else self.temperature,
            filters=filters,
            penalties=penalties,
            bias=self.bias,
            stopping=Stopping(self.stops, None),
            key=None if kind is None else jr.wrap_key_data(self.key),
            any_greedy=False,
        )


def choice(
    rows: Sequence[RowOptions | None], kinds: Kinds, vocab_size: int, key_size: int
) -> Choice:
    """Returns the options of all rows as arrays. `None` is a row without a request."""
    count = len(rows)
    kind = np.full(count, -1, np.int32)
    temperature, top_p, typical_p = (np.ones(count, np.float32) for _ in range(3))
    min_p = np.zeros(count, np.float32)
    top_k = np.full(count, vocab_size, np.int32)
    penalties = np.tile(np.array(NO_PENALTIES, np.float32), (count, 1))
    window, end = np.ones(count, np.int32), np.zeros(count, np.int32)
    bias = np.zeros((count, vocab_size), np.float32) if kinds.bias else None
    stops = np.full((count, kinds.stops), -1, np.int32)
    key = np.zeros((count, key_size), np.uint32)
    top = np.zeros(count, bool)
    for i, row in enumerate(rows):
        if row is None:
            continue
        if row.kind is not None and row.key is not None:
            kind[i], temperature[i] = kinds.filters.index(row.kind), row.temperature
            top_k[i], top_p[i] = row.top_k, row.top_p
            min_p[i], typical_p[i], key[i] = row.min_p, row.typical_p, row.key
        penalties[i], window[i], end[i], top[i] = row.penalties, row.window, row.end, row.top
        if bias is not None and row.bias is not None:
            bias[i] = row.bias
        stops[i, : len(row.stops)] = row.stops
    filters = Filters(*map(jnp.asarray, (top_k, top_p, min_p, typical_p)))
    return Choice(
        kinds,
        jnp.asarray(kind),
        jnp.asarray(temperature),
        filters,
        jnp.asarray(penalties),
        jnp.asarray(window),
        None if bias is None else jnp.asarray(bias),
        jnp.asarray(stops),
        jnp.asarray(key),
        jnp.asarray(top),
        jnp.asarray(end),
    )


class Block(eqx.Module):
    """The tokens of all rows from one call of `decode`, of which `count` are real."""

    tokens: Int[Array, "size rows"]
    log_probs: Float[Array, "size rows"]
    top_ids: Int[Array, "size rows top"] | None
    top_log_probs: Float[Array, "size rows top"] | None
    count: Int[Array, ""]
    finish: Int[Array, " rows"]
    """`RUNNING`, or the `FinishReason` of a row that ended with the last of these tokens. After
    `NOT_FINITE`, the row's last token is none."""


# The choice is kept for the next call, so that only the states are donated.
@eqx.filter_jit(donate="all-except-first")
def decode(
    kept: tuple[
        LanguageModel,
        Choice,
        Bool[Array, " rows"],
        Int[Array, ""],
        Bool[Array, "rows vocab"] | None,
    ],
    states: DecodingState,
    *,
    size: int,
) -> tuple[DecodingState, Block]:
    """Decodes until a row ends.

    **Arguments:**

    - `kept`: the model; the options; which rows decode; the maximum number of tokens; and the
        tokens that are allowed, if there are constraints, in which case there is one token.
    - `states`: the states of the rows, which are consumed.
    - `size`: the size of the output buffers, at least the maximum number of tokens.

    **Returns:**

    The states, and the tokens. The states of the layers of rows that do not decode are arbitrary.
    """
    model, options, running, limit, allowed = kept
    rows = states.token.shape[0]
    top = min(TOP, model.vocab_size) if options.kinds.top else 0

    def next_tokens(carry: tuple[DecodingState, Block]) -> tuple[DecodingState, Block]:
        states, block = carry
        logits, layers = jax.vmap(model.step)(states.token, states.layers)
        logits = logits[:, : model.vocab_size]
        token = options.choose(logits, states.recent, states.position, running, allowed)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - log_z
        is_finite = jnp.isfinite(log_z)
        if allowed is not None:  # The model may exclude every token that is allowed.
            is_finite &= jnp.take_along_axis(allowed, token[:, None], axis=-1)[:, 0]
        position = states.position + 1
        finish = jnp.where(position >= options.end, FinishReason.LENGTH, RUNNING)
        is_stop = jnp.any(token[:, None] == options.stops, axis=-1)
        finish = jnp.where(is_stop, FinishReason.STOP_TOKEN, finish)
        finish = jnp.where(is_finite, finish, FinishReason.NOT_FINITE)
        finish = jnp.where(running, finish, RUNNING).astype(jnp.int32)
        ids, values = block.top_ids, block.top_log_probs
        if ids is not None and values is not None:
            pair = lax.cond(
                jnp.any(running & options.top),
                lambda: _most_likely(logits, top),
                lambda: (jnp.zeros((rows, top), jnp.int32), jnp.zeros((rows, top), logits.dtype)),
            )
            ids = ids.at[block.count].set(pair[0])
            values = values.at[block.count].set((pair[1] - log_z[:, None]).astype(jnp.float32))
        recent = jnp.concatenate([states.recent[:, 1:], token[:, None]], axis=1)
        now = DecodingState(
            layers,
            jnp.where(running, token, states.token),
            jnp.where(running, position, states.position),
            jnp.where(running[:, None], recent, states.recent),
        )
        return now, Block(
            block.tokens.at[block.count].set(token),
            block.log_probs.at[block.count].set(log_prob.astype(jnp.float32)),
            ids,
            values,
            block.count + 1,
            finish,
        )

    def goes_on(carry: tuple[DecodingState, Block]) -> Bool[Array, ""]:
        # The layers' states of a row that has ended would be overwritten by a further token.
        _, block = carry
        return (block.count < limit) & jnp.all(block.finish == RUNNING)

    begin = Block(
        jnp.zeros((size, rows), jnp.int32),
        jnp.zeros((size, rows), jnp.float32),
        jnp.zeros((size, rows, top), jnp.int32) if top else None,
        jnp.zeros((size, rows, top), jnp.float32) if top else None,
        jnp.zeros((), jnp.int32),
        jnp.full(rows, RUNNING, jnp.int32),
    )
    return lax.while_loop(goes_on, next_tokens, (states, begin))


def _most_likely(
    logits: Float[Array, "rows vocab"], count: int
) -> tuple[Int[Array, "rows top"], Float[Array, "rows top"]]:
    values, ids = lax.top_k(logits, count)
    return ids.astype(jnp.int32), values


@eqx.filter_jit
def empty_states(model: LanguageModel, rows: int, capacity: int, window: int) -> DecodingState:
    """Returns states of rows without a request."""
    layers = model.init_state(max_len=capacity)
    state = DecodingState(
        layers,
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.full(window, -1, jnp.int32),
    )
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), state)


@eqx.filter_jit(donate="all-except-first")
def insert(new: tuple[DecodingState, Int[Array, ""]], states: DecodingState) -> DecodingState:
    """Writes the state of one sequence into a row. The other states are consumed."""
    state, row = new
    return jax.tree.map(lambda leaf, one: leaf.at[row].set(one), states, state)


@eqx.filter_jit
def extract(states: DecodingState, row: Int[Array, ""]) -> DecodingState:
    """Returns a copy of the state of one row."""
    return jax.tree.map(lambda leaf: leaf[row], states)


@eqx.filter_jit
def take_rows(states: DecodingState, rows: Int[Array, " new"]) -> DecodingState:
    """Returns a batch of the given rows, for another number of slots."""
    return jax.tree.map(lambda leaf: leaf[rows], states)


def layer_shapes(model: LanguageModel, capacity: int) -> PyTree:
    """Returns the shapes of the layers' states of one sequence."""
    return jax.eval_shape(lambda: model.init_state(max_len=capacity))


def fit_layers(layers: PyTree, shapes: PyTree) -> PyTree:
    """Cuts the caches of one sequence to smaller shapes, which must hold all their tokens."""

    def fit(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
        # Recurrent states have no capacity, and a slice of all of an array is a copy.
        return leaf if leaf.shape == like.shape else leaf[tuple(map(slice, like.shape))]

    return jax.tree.map(fit, layers, shapes)
