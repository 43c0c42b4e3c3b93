import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_count
from ..models import LanguageModel
from ._prefill import prefill_rows
from ._prompts import Prompt, read_prompt
from ._result import FinishReason
from ._sampling import GREEDY, Sampling, check_supported
from ._state import DecodingState, fork
from ._stopping import read_stop_tokens


# A search draws nothing, and ranks by the model's own probabilities.
_UNSUPPORTED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "penalties",
    "logit_bias",
    "stop_strings",
)


class Beams(eqx.Module):
    """What [`mamba_eqx.beam_search`][] returns: continuations, the best one first.

    - `tokens`: with -1 after the end, which is no token. A stop token is the last one.
    - `lengths`: how many of them are real.
    - `log_probs`: of the whole continuation; `-inf` where there are fewer of them than beams.
    - `scores`: by which they are ordered, `log_probs / lengths ** length_penalty`.
    - `finish`: a [`mamba_eqx.generation.FinishReason`][].
    """

    tokens: Int[Array, "beams new"]
    lengths: Int[Array, " beams"]
    log_probs: Float[Array, " beams"]
    scores: Float[Array, " beams"]
    finish: Int[Array, " beams"]


def beam_search(
    model: LanguageModel,
    prompt: Prompt | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    state: DecodingState | None = None,
) -> Beams:
    r"""Looks for the most probable continuations: at every length only the `num_beams` best
    beginnings are kept. A continuation ends with a stop token or at `max_new_tokens`, and scores

    $$\frac{1}{n^\alpha} \sum_{t=1}^{n} \log p_t.$$

    It goes on until no beginning can come to score more than the worst of `num_beams` ended ones,
    whatever follows (transformers' `early_stopping="never"`). To fork a beam is to copy a state.

    Reference: Wu et al., *Google's Neural Machine Translation System* (2016), section 7, without
    their coverage penalty and with transformers' form of the length penalty.

    **Arguments:**

    - `model`, `prompt`, `max_new_tokens`, `stop_tokens`, `state`: as for
        [`mamba_eqx.generate`][], for one prompt.
    - `num_beams`: how many are kept; 1 is greedy decoding.
    - `length_penalty`: $\alpha$, at least 0: larger values favour longer continuations.

    **Returns:** the [`mamba_eqx.generation.Beams`][].

    **Raises:** `ValueError` as `generate`, and for a batch of prompts.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("num_beams", num_beams)
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(
            f"`length_penalty` must be at least 0 and finite, but got {length_penalty}."
        )
    check_supported("beam_search", sampling, _UNSUPPORTED)
    rows = read_prompt(model.vocab_size, "beam_search", prompt, state)
    stop = jnp.zeros(model.vocab_size, bool)
    stop = stop.at[read_stop_tokens(sampling, model.vocab_size, None)].set(True)
    begin = prefill_rows(model, rows, state, room=max_new_tokens)
    alpha = jnp.asarray(length_penalty, jnp.float32)
    return _search(model, fork(begin, num_beams), stop, alpha, max_new_tokens)


class _Search(eqx.Module):
    layers: PyTree
    token: Int[Array, " beams"]
    running: Beams
    ended: Beams
    length: Int[Array, ""]


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

    def go_on(now: _Search) -> Array:
        # What is yet to come has a probability of at most 1, and divides by at most this.
        best = score(jnp.max(now.running.log_probs), size)
        return (now.length < size) & (best > jnp.min(now.ended.scores))

    def body(now: _Search) -> _Search:
        logits, layers = jax.vmap(model.step)(now.token, now.layers)
        log_probs = jax.nn.log_softmax(logits[:, : model.vocab_size]).astype(jnp.float32)
        total = now.running.log_probs[:, None] + log_probs
        length = now.length + 1

        def best(mask: Array, finish: FinishReason) -> tuple[Array, Beams]:
            kept, index = lax.top_k(jnp.where(mask, total, -jnp.inf).reshape(-1), num_beams)
            origin, token = jnp.divmod(index, model.vocab_size)
            beams = Beams(
                tokens=now.running.tokens[origin].at[:, now.length].set(token),
                lengths=jnp.full(num_beams, length),
                log_probs=kept,
                scores=score(kept, length),
                finish=jnp.full(num_beams, int(finish)),
            )
            return origin, beams

        origin, running = best(~stop, FinishReason.LENGTH)
        _, ended = best(stop, FinishReason.STOP_TOKEN)
        return _Search(
            layers=jax.tree.map(lambda leaf: leaf[origin], layers),
            token=running.tokens[:, now.length],
            running=running,
            ended=_best_of(now.ended, ended),
            length=length,
        )

    none = Beams(
        tokens=jnp.full((num_beams, size), -1),
        lengths=jnp.zeros(num_beams, int),
        log_probs=jnp.full(num_beams, -jnp.inf),
        scores=jnp.full(num_beams, -jnp.inf),
        finish=jnp.zeros(num_beams, int),
    )
    # All beams are the same at first: one of them counts.
    only_one = eqx.tree_at(lambda beams: beams.log_probs, none, none.log_probs.at[0].set(0))
    begin = _Search(state.layers, state.token, only_one, none, jnp.zeros((), int))
    end = lax.while_loop(go_on, body, begin)
    # Beginnings that were given up are no continuations.
    complete = end.length == size
    at_limit = jax.tree.map(lambda a, b: jnp.where(complete, a, b), end.running, none)
    return _best_of(end.ended, at_limit)


def _best_of(one: Beams, other: Beams) -> Beams:
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)
    _, index = lax.top_k(both.scores, one.scores.shape[0])
    return jax.tree.map(lambda leaf: leaf[index], both)
