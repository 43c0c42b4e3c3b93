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


_CHUNK = 512  # the most tokens of a prompt that are run at once; a power of two
_SMALLEST = 16  # the smallest size that is compiled, for prompts and for outputs
_HEADS = 64  # the most tokens whose logits are held at once while scoring


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


def prefill_rows(
    model: LanguageModel,
    rows: Rows,
    state: DecodingState | None,
    *,
    room: int = 0,
    window: int = 1,
) -> DecodingState:
    """Runs all but the last token of each row, and returns the state after it.

    **Arguments:**

    - `model`: the model.
    - `rows`: the prompts.
    - `state`: the state that the prompts follow, or `None`.
    - `room`: the number of further tokens that caches must have a capacity for.
    - `window`: the number of last tokens that the penalties depend on.
    """
    return _run(model, rows, state, room=room, window=window, score=False).state


class Scored(NamedTuple):
    """The result of running prompts."""

    state: DecodingState
    log_probs: list[np.ndarray]
    """For each row, of each token but the first (of each token after a given `state`)."""


def score_rows(model: LanguageModel, rows: Rows, state: DecodingState | None) -> Scored:
    """Like `prefill_rows`, and returns the log-probability of each token except a row's first (of
    every token if `state` is given)."""
    return _run(model, rows, state, room=0, window=1, score=True)


def _run(
    model: LanguageModel,
    prompts: Rows,
    state: DecodingState | None,
    *,
    room: int,
    window: int,
    score: bool,
) -> Scored:
    rows, batched = prompts
    count = len(rows)
    if state is None:
        longest = max(map(len, rows)) + room
        layers = _empty(model, count if batched else None, compiled_size(longest))
        position = np.zeros(count, np.int32)
        before = [np.full(max(window, WINDOW), -1, np.int32)] * count
    else:
        position = np.asarray(state.position).reshape(-1)
        pending = np.asarray(state.token).reshape(-1, 1)
        before = list(np.asarray(state.recent).reshape(count, -1)[:, :-1])
        rows = [np.concatenate(pair) for pair in zip(pending, rows, strict=True)]
        longest = max(at + len(row) for at, row in zip(position.tolist(), rows, strict=True))
        layers = with_room(state.layers, compiled_size(longest + room))
        if state.recent.shape[-1] < window:
            raise ValueError(
                f"The `penalties` look at the last {window} tokens, but the `state` given has kept "
                f"{state.recent.shape[-1]} of them. Give the same `penalties` when it is made."
            )
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    whole = longest // _CHUNK * _CHUNK
    padded = np.zeros((count, whole + compiled_size(longest - whole) + 1), np.int32)
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
    return Scored(state, scored)


def compiled_size(size: int) -> int:
    """Returns the size that is compiled for sizes up to it: the next power of two."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def prefill(
    model: LanguageModel,
    prompts: Prompts,
    *,
    mask: Mask | None = None,
    state: DecodingState | None = None,
    room: int = 0,
) -> DecodingState:
    """Reads prompts and stops there: the state from which `generate` goes on.

    A prefix that many prompts share is read once:

    ```python
    system = mbx.prefill(model, tokenizer.encode("You are a poet. "))
    one = mbx.generate(model, tokenizer.encode("Sing!"), 16, state=system)
    two = mbx.generate(model, tokenizer.encode("Rhyme!"), 16, state=system)
    ```

    **Arguments:**

    - `model`, `prompts`, `mask`, `state`: as for [`mamba_eqx.generate`][].
    - `room`: for how many more tokens a cache must have room. State-space models have no use for
        it.

    **Returns:** the state.
    """
    rows = read_prompts(model.vocab_size, prompts, mask, state)
    return prefill_rows(model, rows, state, room=room)
