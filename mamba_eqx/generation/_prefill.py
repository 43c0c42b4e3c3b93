"""Prefill: running the model over prompts, in parallel over their tokens."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._trees import repeated
from ..layers import with_room
from ..models import LanguageModel
from ._prompts import Mask, Prompts, Rows, read_prompts
from ._state import WINDOW, DecodingState


_CHUNK = 512  # the maximum number of tokens that are run at once; a power of two
_MIN_SIZE = 16  # the smallest size that is compiled, for prompts and for outputs
_HEAD_BATCH = 64  # the maximum number of tokens whose logits are in memory at once while scoring


class Scored(NamedTuple):
    """The state after prompts, and the log-probabilities of their tokens."""

    state: DecodingState
    log_probs: list[np.ndarray]
    """An array for each row, with a number for each token except the first (for every token if the
    row follows a given `state`)."""


def prefill(
    model: LanguageModel,
    prompts: Prompts,
    *,
    mask: Mask | None = None,
    state: DecodingState | None = None,
    room: int = 0,
) -> DecodingState:
    """Runs prompts without generating, and returns the state that `generate` continues from.

    A prefix that many prompts share is run only once:

    ```python
    system = mbx.prefill(model, tokenizer.encode("You are a poet. "))
    one = mbx.generate(model, tokenizer.encode("Sing!"), 16, state=system)
    two = mbx.generate(model, tokenizer.encode("Rhyme!"), 16, state=system)
    ```

    **Arguments:**

    - `model`: the model.
    - `prompts`: one sequence of token ids; a list of sequences, of any lengths; or an array of
        shape `(rows, seq)`.
    - `mask`: for an array of prompts with padding to the left or to the right: a boolean array of
        shape `(rows, seq)`, true for real tokens.
    - `state`: the state that the prompts follow, instead of the empty past.
    - `room`: the number of further tokens to reserve capacity for in caches. State-space models do
        not use it.

    **Returns:**

    The state after the prompts, with an axis of rows unless `prompts` is one sequence.

    **Raises:** `ValueError` for token ids outside the vocabulary, or for an empty prompt without a
    `state`.
    """
    rows = read_prompts(model.vocab_size, prompts, mask, state)
    return prefill_rows(model, rows, state, room=room)


def prefill_rows(
    model: LanguageModel,
    rows: Rows,
    state: DecodingState | None,
    *,
    room: int = 0,
    window: int = 1,
) -> DecodingState:
    """Runs all tokens of each row but the last, and returns the state of the generation after them.

    **Arguments:**

    - `model`: the model.
    - `rows`: the prompts.
    - `state`: the state that the prompts follow, or `None`.
    - `room`: the number of further tokens to reserve capacity for in caches.
    - `window`: the number of last tokens that the penalties depend on.
    """
    return _run(model, rows, state, room=room, window=window, score=False).state


def score_rows(model: LanguageModel, rows: Rows, state: DecodingState | None) -> Scored:
    """Like `prefill_rows`, and also returns the log-probability of each token except a row's first
    (of every token if `state` is given)."""
    return _run(model, rows, state, room=0, window=1, score=True)


def compiled_size(size: int) -> int:
    """Returns the size that is compiled for anything up to `size`: the next power of two."""
    return max(_MIN_SIZE, 1 << (size - 1).bit_length())


def compiled_sizes(most: int) -> list[int]:
    """Returns the sizes of chunks that are compiled for prompts of up to `most` tokens."""
    last = min(_CHUNK, compiled_size(most))
    return [_MIN_SIZE << n for n in range((last // _MIN_SIZE).bit_length())]


class _Begin(NamedTuple):
    """The state before prompts, and the tokens to run from it."""

    layers: PyTree
    tokens: list[np.ndarray]
    """The tokens of each row, including the pending token of a given state."""
    position: np.ndarray
    """The number of tokens before `tokens`, for each row."""
    recent: list[np.ndarray]
    """The last tokens before `tokens`, for each row."""
    window: int
    """The number of last tokens to keep."""


def _begin(
    model: LanguageModel, prompts: Rows, state: DecodingState | None, room: int, window: int
) -> _Begin:
    count = len(prompts.tokens)
    if state is None:
        longest = max(map(len, prompts.tokens)) + room
        layers = _empty(model, prompts.size, compiled_size(longest))
        size = max(window, WINDOW)
        recent = [np.full(size, -1, np.int32)] * count
        return _Begin(layers, prompts.tokens, np.zeros(count, np.int32), recent, size)
    size = state.recent.shape[-1]
    position = np.asarray(state.position).reshape(-1)
    pending = np.asarray(state.token).reshape(-1, 1)
    recent = list(np.asarray(state.recent).reshape(count, -1)[:, :-1])
    tokens = [np.concatenate(pair) for pair in zip(pending, prompts.tokens, strict=True)]
    longest = max(at + len(row) for at, row in zip(position.tolist(), tokens, strict=True))
    layers = with_room(state.layers, compiled_size(longest + room))
    if size < window:
        raise ValueError(
            f"The `penalties` look at the last {window} tokens, but the `state` given has kept "
            f"{size} of them. Give the same `penalties` when the state is made."
        )
    return _Begin(layers, tokens, position, recent, size)


def _run(
    model: LanguageModel,
    prompts: Rows,
    state: DecodingState | None,
    *,
    room: int,
    window: int,
    score: bool,
) -> Scored:
    begin = _begin(model, prompts, state, room, window)
    rows, layers = begin.tokens, begin.layers
    count = len(rows)
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    whole = longest // _CHUNK * _CHUNK
    padded = np.zeros((count, whole + compiled_size(longest - whole) + 1), np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row

    def shaped(values: np.ndarray) -> Array:
        # Short prompts take as long as a few calls of `jnp.asarray`, which converts on the device.
        return jax.device_put(np.asarray(values if prompts.batched else values[0], np.int32))

    chunks = [np.zeros((count, 0), np.float32)]
    for at in range(0, longest, _CHUNK):
        chunk = padded[:, at : at + _CHUNK + 1]
        remaining = shaped(np.clip(lengths - at, 0, _CHUNK))
        targets = shaped(chunk[:, 1:]) if score else None
        log_probs, layers = _run_chunk(model, layers, shaped(chunk[:, :-1]), targets, remaining)
        if log_probs is not None:
            chunks.append(np.asarray(log_probs).reshape(count, -1))
    joined = np.concatenate(chunks, axis=1)
    scored = [row[:length] for row, length in zip(joined, lengths, strict=True)]
    recent = [
        np.concatenate(pair)[-begin.window :] for pair in zip(begin.recent, rows, strict=True)
    ]
    last = np.array([row[-1] for row in rows], np.int32)
    state = DecodingState(
        layers,
        shaped(last),
        shaped(begin.position + lengths),
        shaped(np.array(recent, np.int32)),
    )
    return Scored(state, scored)


@eqx.filter_jit
def _empty(model: LanguageModel, rows: int | None, max_len: int) -> PyTree:
    layers = model.init_state(max_len=max_len)
    return layers if rows is None else repeated(layers, rows)


@eqx.filter_jit
def _run_chunk(
    model: LanguageModel,
    layers: PyTree,
    tokens: Int[Array, "*batch seq"],
    targets: Int[Array, "*batch seq"] | None,
    lengths: Int[Array, "*batch"],
) -> tuple[Float[Array, "*batch seq"] | None, PyTree]:
    """Runs a chunk of the prompts.

    **Returns:**

    The log-probabilities of `targets`, the token that follows each token (`None` if
    `targets` is `None`), and the layer states after `lengths` tokens.
    """

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

    # The logits of all tokens at once would be the largest array of the computation.
    return lax.map(one, (features, targets), batch_size=_HEAD_BATCH)
