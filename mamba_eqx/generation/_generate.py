import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._checks import check_count
from ..models import LanguageModel
from ._constrained import begin, compiled_constraint, matching_for
from ._loop import Cursor, Decoded, decode, trim
from ._model import separated
from ._options import options_for
from ._prefill import compiled_size, prefill_rows
from ._prompts import Mask, Prompt, Prompts, read_prompt, read_prompts
from ._result import Generation, check_finite
from ._sampling import Sampling
from ._state import DecodingState
from ._stream import Stream, asking
from .constraints import HostConstraint


def generate(
    model: LanguageModel,
    prompts: Prompts | None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    mask: Mask | None = None,
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    """Continues one prompt, or several at once.

    Rows never influence each other: row `i` equals what its prompt gives alone, with the key
    `jax.random.fold_in(key, i)`. Prompts may differ in length; padding never reaches a state. The
    length of the longest prompt is rounded up to a power of two, and the function is compiled once
    for each rounded length. Memory does not grow with the length of a prompt, except for the caches
    of [`mamba_eqx.Attention`][]: these have a capacity for the prompts and for `max_new_tokens`,
    rounded up to a power of two, and are enlarged when generation continues from them.

    **Arguments:**

    - `model`: the model.
    - `prompts`: one sequence of token ids; a list of sequences, of any lengths; an array of shape
        `(rows, seq)`; or the result of a transformers tokenizer, a mapping with `input_ids` and
        perhaps an `attention_mask`. `None` (only together with `state`) adds no tokens and
        continues from the state.
    - `max_new_tokens`: the maximum number of tokens to generate for each row, at least 1.
    - `sampling`: how to choose tokens, and where rows end: a [`mamba_eqx.Sampling`][]. Greedy by
        default.
    - `mask`: for an array of prompts with padding to the left or to the right: a boolean array of
        shape `(rows, seq)`, true for real tokens.
    - `state`: the state of an earlier generation, to start from instead of the empty past. The
        prompts, which may then be empty, follow all tokens of that generation. Generating `n`
        tokens, and then `m` tokens from the state, gives the same tokens as generating `n + m`,
        under sampling too if the key is the same. (A stop string must lie within one call.)
    - `key`: the key of the random numbers, required if any row has a positive temperature.

    **Returns:**

    A [`mamba_eqx.Generation`][], with an axis of rows unless `prompts` is one
    sequence.

    **Raises:** `ValueError` for token ids outside the vocabulary, an empty prompt without a
    `state`, options that do not fit the model or the number of rows, a positive temperature
    without a key, a constraint that only Python can run, or logits that are not finite (see
    [`mamba_eqx.generation.FinishReason`][]).
    """
    check_count("max_new_tokens", max_new_tokens)
    rows = read_prompts(model.vocab_size, prompts, mask, state)
    options = options_for(sampling, model.vocab_size, rows.size, key)
    constraint = compiled_constraint("generate", sampling, model.vocab_size)
    start = prefill_rows(model, rows, state, room=max_new_tokens, window=options.window)
    cursor = Cursor(
        start,
        options.stopping.start(start.token.shape),
        begin(constraint, options.bias, rows.size),
    )
    limit = jnp.asarray(max_new_tokens, jnp.int32)
    size = compiled_size(max_new_tokens)
    out = decode(separated(model), cursor, options, limit, size, constraint).out
    check_finite(out.finish, out.state.position)
    return trim(out, max_new_tokens)


def stream(
    model: LanguageModel,
    prompt: Prompt | None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
    block: int = 16,
) -> Stream:
    """Continues one prompt, yielding the same tokens as `generate`, incrementally.

    Tokens are decoded in blocks, each with one call of a compiled function. The first block has one
    token, so that iteration starts soon; the following blocks double in size up to `block`.

    **Arguments:**

    - `model`: the model.
    - `prompt`: one sequence of token ids. `None` (only together with `state`) adds no tokens and
        continues from the state.
    - `max_new_tokens`: the maximum number of tokens to generate, at least 1.
    - `sampling`: how to choose tokens, and where the text ends: a [`mamba_eqx.Sampling`][] without
        options per row. Greedy by default.
    - `state`: the state of an earlier generation, to start from instead of the empty past.
    - `key`: the key of the random numbers, required if the temperature is positive.
    - `block`: the maximum number of tokens to decode at a time, at least 1. Another value
        recompiles. It is 1 under a [`mamba_eqx.generation.HostConstraint`][].

    **Returns:**

    A [`mamba_eqx.generation.Stream`][], an iterator over at most `max_new_tokens`
    token ids. A stop token is included, as the last token.

    **Raises:** `ValueError` in the same cases as `generate`, and for several prompts. `stream`
    itself raises, before the first token is requested, except for logits that are not finite:
    these raise after the last token before them, as do errors of a constraint.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("block", block)
    rows = read_prompt(model.vocab_size, "stream", prompt, state)
    options = options_for(sampling, model.vocab_size, rows.size, key)

    constraint = None
    decoding_model = separated(model)
    if isinstance(sampling.constraint, HostConstraint):
        matching = matching_for(sampling, model.vocab_size)
    else:
        matching = None
        constraint = compiled_constraint("stream", sampling, model.vocab_size)

    def start() -> Cursor:
        now = prefill_rows(model, rows, state, room=max_new_tokens, window=options.window)
        return Cursor(now, options.stopping.start(()), begin(constraint, options.bias, None))

    def decode_block(cursor: Cursor, limit: int) -> Decoded:
        most = jnp.asarray(limit, jnp.int32)
        return decode(decoding_model, cursor, options, most, block, constraint)

    if matching is None:
        return Stream(model, start, decode_block, max_new_tokens, block)
    block = 1
    return Stream(model, start, asking(matching, decode_block), max_new_tokens, block)
