from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray, PyTree

from . import _sampling
from ._language_model import LanguageModel
from ._prompts import DecodingState, Prompt, check_tokens, read_prompts
from ._protocol import with_room


_CHUNK = 512  # the most tokens of a prompt that are run at once; a power of two
_BUCKET = 16  # the smallest size that is compiled, for prompts and for outputs


class Generation(eqx.Module):
    """What [`mamba_eqx.generate`][] returns. For one prompt there is no batch axis.

    - `tokens`: the new tokens, without the prompt. A stop token that ended a row is its last one.
        After the end there is padding of -1, which is no token.
    - `lengths`: how many of them are real.
    - `log_probs`: the logarithm of the probability that the model itself gave to each token, that
        is without temperature and filters, among the `vocab_size` tokens. 0 after the end.
    - `stopped`: why it ended. True: at a stop token. False: at `max_new_tokens`.
    - `state`: to go on from here, `generate(model, None, n, state=generation.state)`.
    """

    tokens: Int[Array, "*batch new"]
    lengths: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    stopped: Bool[Array, "*batch"]
    state: DecodingState


def generate(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt] | Integer[np.ndarray, "_ _"] | Integer[Array, "_ _"] | None,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    """Continues one prompt, or several at once.

    Rows never influence each other: row `i` of a list is what its prompt gives alone, with the
    key `jax.random.fold_in(key, i)`. Prompts may differ in length; nothing that is computed for
    their padding reaches a state. A compiled function is reused for all prompts whose longest
    falls into the same power of two, and memory does not grow with the length of a prompt, except
    for the caches of [`mamba_eqx.Attention`][]: these get room for the prompts and for
    `max_new_tokens`, rounded up to a power of two, and grow if they are gone on from.

    **Arguments:**

    - `model`: the model.
    - `prompts`: one sequence of integers, or a list of sequences, of any lengths. `None`, with a
        `state`: nothing more, just go on.
    - `max_new_tokens`: the most tokens to generate, per row.
    - `temperature`: 0 (greedy: always the most likely token; no other option then changes
        anything) or the temperature to sample with; see [`mamba_eqx.temperature`][].
    - `top_k`, `top_p`, `min_p`: filters for sampling; see [`mamba_eqx.top_k`][],
        [`mamba_eqx.top_p`][] and [`mamba_eqx.min_p`][].
    - `stop_tokens`: a row ends with the first of these that it generates.
    - `state`: of an earlier generation, in place of the empty past: the prompts (which may then
        be empty) come after all that it generated. `n` tokens and then `m` from the state are
        the same as `n + m`, with sampling too if the key is the same.
    - `key`: for sampling.

    **Returns:** a [`mamba_eqx.Generation`][].

    **Raises:** `ValueError` for tokens that the model does not have, an empty prompt, an option
    out of range, or a temperature without a key.
    """
    how = _how(model, temperature, top_k, top_p, min_p, stop_tokens, key)
    _check_count("max_new_tokens", max_new_tokens)
    rows, batched = read_prompts(model.vocab_size, prompts, state)
    start = _start(model, rows, batched, state, max_new_tokens)
    if how.temperature is None:
        key = None
    elif batched:
        key = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(len(rows)))  # pyright: ignore
    out = _decode(
        model, start, how, key, jnp.asarray(max_new_tokens, jnp.int32), _bucket(max_new_tokens)
    )
    cut = lambda buffer: buffer[..., :max_new_tokens]  # noqa: E731
    return eqx.tree_at(
        lambda out: (out.tokens, out.log_probs), out, (cut(out.tokens), cut(out.log_probs))
    )


def stream(
    model: LanguageModel,
    prompt: Prompt | None,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
    block: int = 16,
) -> Iterator[int]:
    """Continues one prompt and yields the tokens as they come: those of `generate`.

    Tokens are decoded in blocks, each one call of a compiled function. The first block is one
    token long, so that it comes soon; the following double up to `block`.

    **Arguments:**

    - `prompt`: one sequence of integers.
    - `block`: the most tokens to decode at a time. Another value recompiles.
    - the others as for [`mamba_eqx.generate`][].

    **Returns:** an iterator over at most `max_new_tokens` tokens. A stop token is the last one.

    **Raises:** `ValueError` as `generate`, at once and not with the first token.
    """
    how = _how(model, temperature, top_k, top_p, min_p, stop_tokens, key)
    _check_count("max_new_tokens", max_new_tokens)
    _check_count("block", block)
    rows, batched = read_prompts(model.vocab_size, prompt, state)
    if batched:
        raise ValueError(
            f"`stream` takes one prompt, but got {len(rows)}. Use `generate` for several."
        )
    if how.temperature is None:
        key = None

    def tokens() -> Iterator[int]:
        now = _start(model, rows, False, state, max_new_tokens)
        left, size = max_new_tokens, 1
        while left > 0:
            size = min(size, left, block)
            out = _decode(model, now, how, key, jnp.asarray(size, jnp.int32), block)
            yield from np.asarray(out.tokens)[: int(out.lengths)].tolist()
            if bool(out.stopped):
                return
            now, left, size = out.state, left - size, 2 * size

    return tokens()


class _How(eqx.Module):
    """How a token is chosen and when a row ends. The values are arrays, so that only turning an
    option on or off recompiles. A temperature of `None` is greedy."""

    temperature: Float[Array, ""] | None
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    stop_tokens: Int[Array, " stop"]

    def choose(self, logits: Float[Array, " vocab"], key: PRNGKeyArray | None) -> Int[Array, ""]:
        if self.temperature is None or key is None:
            return _sampling.greedy(logits)
        return _sampling.sample(
            logits,
            key,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )


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
def _decode(
    model: LanguageModel,
    state: DecodingState,
    how: _How,
    key: PyTree[Array],
    limit: Int[Array, ""],
    size: int,
) -> Generation:
    """At most `limit` tokens, in buffers of `size`; with a batch, a key for each row."""

    def go_on(out: Generation) -> Bool[Array, ""]:
        return (out.lengths < limit) & ~out.stopped

    def row(state: DecodingState, key: PRNGKeyArray | None) -> Generation:
        def body(out: Generation) -> Generation:
            now, i = out.state, out.lengths
            logits, layers = model.step(now.token, now.layers)
            logits = logits[: model.vocab_size]
            token_key = None if key is None else jr.fold_in(key, now.position)
            token = how.choose(logits, token_key)
            log_prob = logits[token] - jax.nn.logsumexp(logits)
            return Generation(
                tokens=out.tokens.at[i].set(token),
                lengths=i + 1,
                log_probs=out.log_probs.at[i].set(log_prob.astype(jnp.float32)),
                stopped=jnp.any(token == how.stop_tokens),
                state=DecodingState(layers, token, now.position + 1),
            )

        out = Generation(
            tokens=jnp.full(size, -1, jnp.int32),
            lengths=jnp.zeros((), jnp.int32),
            log_probs=jnp.zeros(size, jnp.float32),
            stopped=jnp.zeros((), jnp.bool_),
            state=state,
        )
        return lax.while_loop(go_on, body, out)

    # Under `vmap` the loop runs until every row has ended, and rows that have keep their value.
    return (row if state.token.ndim == 0 else jax.vmap(row))(state, key)


def _start(
    model: LanguageModel,
    rows: list[np.ndarray],
    batched: bool,
    state: DecodingState | None,
    max_new_tokens: int,
) -> DecodingState:
    """The state after the prompts: all but the last token of each row are run."""
    if state is None:
        longest = max(map(len, rows)) + max_new_tokens
        layers = _empty(model, len(rows) if batched else None, _bucket(longest))
        position = np.zeros(len(rows), np.int32)
    else:
        position = np.asarray(state.position).reshape(-1)
        pending = np.asarray(state.token).reshape(-1, 1)
        rows = [np.concatenate(pair) for pair in zip(pending, rows, strict=True)]
        longest = max(at + len(row) for at, row in zip(position.tolist(), rows, strict=True))
        layers = with_room(state.layers, _bucket(longest + max_new_tokens))
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    longest = int(lengths.max())
    whole = longest // _CHUNK * _CHUNK
    padded = np.zeros((len(rows), whole + _bucket(longest - whole)), np.int32)
    for padded_row, row, length in zip(padded, rows, lengths, strict=True):
        padded_row[:length] = row[:-1]

    def shaped(values: np.ndarray) -> Array:
        return jnp.asarray(values if batched else values[0], jnp.int32)

    for at in range(0, longest, _CHUNK):
        tokens = shaped(padded[:, at : at + _CHUNK])
        layers = _prefill(model, layers, tokens, shaped(np.clip(lengths - at, 0, _CHUNK)))
    last = np.array([row[-1] for row in rows], np.int32)
    return DecodingState(layers, shaped(last), shaped(position + lengths))


def _bucket(size: int) -> int:
    return max(_BUCKET, 1 << (size - 1).bit_length())


def _how(
    model: LanguageModel,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    stop_tokens: Sequence[int],
    key: PRNGKeyArray | None,
) -> _How:
    is_greedy = not isinstance(temperature, bool | str) and temperature == 0
    if not is_greedy:
        _sampling.check_temperature(temperature)
    if top_k is not None:
        _sampling.check_top_k(top_k)
    if top_p is not None:
        _sampling.check_top_p(top_p)
    if min_p is not None:
        _sampling.check_min_p(min_p)
    stop = jnp.asarray(check_tokens(model.vocab_size, "stop_tokens", stop_tokens))
    if is_greedy:
        return _How(None, None, None, None, stop)
    if key is None:
        raise ValueError(
            f"Sampling with temperature={temperature} needs a key: give `key=jax.random.key(0)`, "
            "or `temperature=0` for greedy decoding."
        )
    if not _is_key(key):
        raise ValueError(f"`key` must be one key made by `jax.random.key`, but got {key!r}.")

    def value(x: Any, dtype: Any) -> Array | None:
        return None if x is None else jnp.asarray(x, dtype)

    return _How(
        value(temperature, jnp.float32),
        value(None if top_k is None else min(top_k, model.vocab_size), jnp.int32),
        value(top_p, jnp.float32),
        value(min_p, jnp.float32),
        stop,
    )


def _is_key(key: Any) -> bool:
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.ndim == 1 and key.dtype == jnp.uint32


def _check_count(name: str, value: Any) -> None:
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or not 1 <= value < 2**31:
        raise ValueError(
            f"`{name}` must be an integer of at least 1 and below 2**31, but got {name}={value!r}."
        )
