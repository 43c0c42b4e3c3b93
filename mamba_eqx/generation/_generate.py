from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from .._checks import check_count
from ..models import LanguageModel
from ..text import Tokenizer, stop_table
from ._loop import cut, decode
from ._options import PerRow, PerRowInt, read_choice
from ._prefill import bucket, start
from ._prompts import Prompt, read_prompt, read_prompts
from ._result import Generation
from ._state import DecodingState
from ._stream import Stream
from .sampling import Penalties


def generate(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt] | Integer[np.ndarray, "_ _"] | Integer[Array, "_ _"] | None,
    max_new_tokens: int,
    *,
    mask: Bool[np.ndarray, "_ _"] | Bool[Array, "_ _"] | None = None,
    temperature: PerRow = 0.0,
    top_k: PerRowInt | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
    typical_p: PerRow | None = None,
    penalties: Penalties | None = None,
    logit_bias: Mapping[int, float] | Float[Array, " vocab"] | None = None,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
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
    - `prompts`: one sequence of integers; a list of sequences, of any lengths; or an array of
        shape `(rows, seq)`. `None`, with a `state`: nothing more, just go on.
    - `max_new_tokens`: the most tokens to generate, per row.
    - `mask`: of an array with padding, to the left or to the right: true for real tokens.
    - `temperature`: 0 (greedy: always the most likely token; no filter then changes anything) or
        the temperature to sample with; see [`mamba_eqx.sampling.temperature`][].
    - `top_k`, `top_p`, `min_p`, `typical_p`: filters for sampling; see
        [`mamba_eqx.sampling.top_k`][], [`mamba_eqx.sampling.top_p`][], [`mamba_eqx.sampling.min_p`][]
        and [`mamba_eqx.sampling.typical_p`][]. These and the temperature may be one number for each
        row.
    - `penalties`: against repetition; see [`mamba_eqx.sampling.Penalties`][].
    - `logit_bias`: added to the logits after the penalties: an array with an entry for each
        token, or a mapping from some tokens. `-inf` bans a token.
    - `stop_tokens`: a row ends with the first of these that it generates. One list for all rows,
        or a list of lists.
    - `stop_strings`: a row ends with the token that completes one of these within the text that it
        generates, wherever they begin and end within tokens. They need the `tokenizer`.
    - `tokenizer`: used for that alone.
    - `state`: of an earlier generation, in place of the empty past: the prompts (which may then
        be empty) come after all that it generated. `n` tokens and then `m` from the state are
        the same as `n + m`, with sampling too if the key is the same.
    - `key`: for sampling.

    **Returns:** a [`mamba_eqx.Generation`][].

    **Raises:** `ValueError` for tokens that the model does not have, an empty prompt, an option
    out of range, or a temperature without a key.
    """
    check_count("max_new_tokens", max_new_tokens)
    rows, batched = read_prompts(model.vocab_size, prompts, mask, state)
    choice = read_choice(
        model,
        len(rows) if batched else None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        penalties=penalties,
        logit_bias=logit_bias,
        stop_tokens=stop_tokens,
        key=key,
    )
    table = _stop_table(model, tokenizer, stop_strings)
    now = start(model, rows, batched, state, room=max_new_tokens, window=choice.window)
    if choice.temperature is None:
        key = None
    elif batched:
        key = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(len(rows)))  # pyright: ignore
    limit, size = jnp.asarray(max_new_tokens, jnp.int32), bucket(max_new_tokens)
    out, _ = decode(model, now, choice, table, jnp.zeros_like(now.token), key, limit, size)
    return cut(out, max_new_tokens)


def stream(
    model: LanguageModel,
    prompt: Prompt | None,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    penalties: Penalties | None = None,
    logit_bias: Mapping[int, float] | Float[Array, " vocab"] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
    block: int = 16,
) -> Stream:
    """Continues one prompt and yields the tokens as they come: those of `generate`.

    Tokens are decoded in blocks, each one call of a compiled function. The first block is one
    token long, so that it comes soon; the following double up to `block`.

    **Arguments:**

    - `prompt`: one sequence of integers.
    - `block`: the most tokens to decode at a time. Another value recompiles.
    - the others as for [`mamba_eqx.generate`][].

    **Returns:** a [`mamba_eqx.generation.Stream`][], an iterator over at most
    `max_new_tokens` tokens. A stop token is the last one.

    **Raises:** `ValueError` as `generate`, at once and not with the first token.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("block", block)
    row = read_prompt(model.vocab_size, "stream", prompt, state)
    choice = read_choice(
        model,
        None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        penalties=penalties,
        logit_bias=logit_bias,
        stop_tokens=stop_tokens,
        key=key,
    )
    table = _stop_table(model, tokenizer, stop_strings)
    if choice.temperature is None:
        key = None

    def blocks() -> Iterator[Generation]:
        now = start(model, [row], False, state, room=max_new_tokens, window=choice.window)
        matched = zero = jnp.zeros_like(now.token)
        yield Generation(jnp.zeros(0, jnp.int32), zero, jnp.zeros(0), zero, now)
        left, size = max_new_tokens, 1
        while left > 0:
            size = min(size, left, block)
            limit = jnp.asarray(size, jnp.int32)
            out, matched = decode(model, now, choice, table, matched, key, limit, block)
            yield out
            if bool(out.stopped):
                return
            now, left, size = out.state, left - size, 2 * size

    return Stream(model, blocks(), max_new_tokens)


def _stop_table(
    model: LanguageModel, tokenizer: Tokenizer | None, strings: Sequence[str]
) -> Array | None:
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError(
            f"`stop_strings={strings!r}` need the `tokenizer`, which knows the text of tokens."
        )
    table = stop_table(tokenizer, strings)
    # Tokens of the model beyond those of the tokenizer are not text, and end every match.
    missing = model.vocab_size - table.shape[1]
    table = np.pad(table, ((0, 0), (0, max(0, missing))))
    table[-1] = len(table) - 1
    return jnp.asarray(table)
