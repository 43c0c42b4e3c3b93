"""Beam search for the most probable continuations."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_count
from ..models import LanguageModel
from ._model import separated
from ._prefill import prefill_rows
from ._prompts import Prompt, read_prompt
from ._result import FinishReason, check_finite
from ._sampling import Sampling, check_supported
from ._state import DecodingState, fork
from ._stopping import read_stop_tokens
from .sampling import LARGEST, read_number


# The search draws nothing and ranks by the model's own probabilities.
_UNSUPPORTED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "penalties",
    "logit_bias",
    "constraint",
    "stop_strings",
)


class Beams(eqx.Module):
    """The result of [`mamba_eqx.beam_search`][]: continuations, the best one first.

    - `tokens`: the new token ids, of shape `(num_beams, max_new_tokens)`, without the prompt. A
        stop token is included, as the last token. Padded with -1, which is not a token id.
    - `length`: the number of real tokens of each continuation, of shape `(num_beams,)`.
    - `log_probs`: the log-probability of each whole continuation, in nats, of shape `(num_beams,)`.
        `-inf` in the last rows if fewer than `num_beams` continuations were found.
    - `scores`: the scores that the continuations are ordered by,
        `log_probs / length ** length_penalty`, of shape `(num_beams,)`.
    - `finish`: why each continuation ended, of shape `(num_beams,)`: values of
        [`mamba_eqx.generation.FinishReason`][].
    """

    tokens: Int[Array, "beams new"]
    length: Int[Array, " beams"]
    log_probs: Float[Array, " beams"]
    scores: Float[Array, " beams"]
    finish: Int[Array, " beams"]


def beam_search(
    model: LanguageModel,
    prompt: Prompt | None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    state: DecodingState | None = None,
) -> Beams:
    r"""Searches for the most probable continuations of one prompt.

    At every length, only the `num_beams` most probable unfinished continuations are kept. A
    continuation ends with a stop token or at `max_new_tokens`. The score of $n$ tokens is

    $$\frac{1}{n^\alpha} \sum_{t=1}^{n} \log p_t.$$

    The search ends when no unfinished continuation can still score more than the worst of
    `num_beams` finished ones (transformers' `early_stopping="never"`). Forking a beam copies its
    state.

    Reference: Wu et al., *Google's Neural Machine Translation System* (2016), section 7, without
    their coverage penalty and with transformers' form of the length penalty.

    **Arguments:**

    - `model`: the model.
    - `prompt`: one sequence of token ids. `None` (only together with `state`) adds no tokens and
        continues from the state.
    - `max_new_tokens`: the maximum number of tokens of a continuation, at least 1. Another value
        recompiles.
    - `sampling`: a [`mamba_eqx.Sampling`][] with `stop_tokens` only. The search ranks by the
        model's own probabilities, and supports no other option.
    - `num_beams`: the number of continuations to keep, at least 1; 1 is greedy decoding. Another
        value recompiles.
    - `length_penalty`: $\alpha$, at least 0 and finite. Larger values favour longer continuations.
    - `state`: the state of an earlier generation, to start from instead of the empty past.

    **Returns:**

    A [`mamba_eqx.generation.Beams`][].

    **Raises:** `ValueError` in the same cases as `generate`, for several prompts, and for options
    other than `stop_tokens`.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("num_beams", num_beams)
    alpha = read_number("length_penalty", length_penalty)
    if alpha is not None and not 0 <= alpha <= LARGEST:
        raise ValueError(
            "`length_penalty` must be at least 0 and finite, but got "
            f"length_penalty={length_penalty!r}. Use 0 to rank by the log-probability alone."
        )
    check_supported("beam_search", sampling, _UNSUPPORTED)
    rows = read_prompt(model.vocab_size, "beam_search", prompt, state)
    stop = jnp.zeros(model.vocab_size, bool)
    stop = stop.at[read_stop_tokens(sampling, model.vocab_size, None)].set(True)
    begin = prefill_rows(model, rows, state, room=max_new_tokens)
    exponent = jnp.asarray(length_penalty, jnp.float32)
    beams = _search(separated(model), fork(begin, num_beams), stop, exponent, max_new_tokens)
    check_finite(beams.finish, begin.position + jnp.max(beams.length) + 1, "beam")
    return beams


class _Search(eqx.Module):
    """The carry of the search."""

    layers: PyTree
    token: Int[Array, " beams"]
    running: Beams
    ended: Beams
    length: Int[Array, ""]
    is_finite: Bool[Array, ""]


class _Candidates(NamedTuple):
    """The best continuations by one token, and the beam that each continues."""

    origin: Int[Array, " beams"]
    beams: Beams


@eqx.filter_jit
def _search(
    model: LanguageModel,
    state: DecodingState,
    stop: Bool[Array, " vocab"],
    alpha: Float[Array, ""],
    size: int,
) -> Beams:
    num_beams = state.token.shape[0]

    def score(log_probs: Array, length: Array | int) -> Array:
        return log_probs / jnp.asarray(length, jnp.float32) ** alpha

    def is_running(now: _Search) -> Array:
        # Further tokens have a probability of at most 1, and the length is at most `size`.
        best = score(jnp.max(now.running.log_probs), size)
        return (now.length < size) & (best > jnp.min(now.ended.scores)) & now.is_finite

    def advance(now: _Search) -> _Search:
        logits, layers = jax.vmap(model.step)(now.token, now.layers)
        log_probs = jax.nn.log_softmax(logits[:, : model.vocab_size]).astype(jnp.float32)
        total = now.running.log_probs[:, None] + log_probs
        length = now.length + 1

        def best(mask: Array, finish: FinishReason) -> _Candidates:
            kept, index = lax.top_k(jnp.where(mask, total, -jnp.inf).reshape(-1), num_beams)
            origin, token = jnp.divmod(index, model.vocab_size)
            beams = Beams(
                tokens=now.running.tokens[origin].at[:, now.length].set(token),
                length=jnp.full(num_beams, length),
                log_probs=kept,
                scores=score(kept, length),
                finish=jnp.full(num_beams, int(finish)),
            )
            return _Candidates(origin, beams)

        origin, running = best(~stop, FinishReason.LENGTH)
        _, ended = best(stop, FinishReason.STOP_TOKEN)
        return _Search(
            layers=jax.tree.map(lambda leaf: leaf[origin], layers),
            token=running.tokens[:, now.length],
            running=running,
            ended=_best_of(now.ended, ended),
            length=length,
            is_finite=~jnp.any(jnp.isnan(log_probs)),
        )

    none = Beams(
        tokens=jnp.full((num_beams, size), -1),
        length=jnp.zeros(num_beams, int),
        log_probs=jnp.full(num_beams, -jnp.inf),
        scores=jnp.full(num_beams, -jnp.inf),
        finish=jnp.zeros(num_beams, int),
    )
    # All beams are equal at first, so that only one of them must be continued.
    only_one = eqx.tree_at(lambda beams: beams.log_probs, none, none.log_probs.at[0].set(0))
    begin = _Search(
        state.layers, state.token, only_one, none, jnp.zeros((), int), jnp.ones((), bool)
    )
    end = lax.while_loop(is_running, advance, begin)
    # Unfinished continuations count only if they have reached `max_new_tokens`.
    complete = end.length == size
    at_limit = jax.tree.map(lambda a, b: jnp.where(complete, a, b), end.running, none)
    found = _best_of(end.ended, at_limit)
    finish = jnp.where(end.is_finite, found.finish, FinishReason.NOT_FINITE)
    return eqx.tree_at(lambda beams: beams.finish, found, finish)


def _best_of(one: Beams, other: Beams) -> Beams:
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)
    _, index = lax.top_k(both.scores, one.scores.shape[0])
    return jax.tree.map(lambda leaf: leaf[index], both)
