"""Speculative decoding: a cheap draft proposes several tokens, and the model checks all of them in
one pass, which reads the weights once."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_count
from ..models import LanguageModel
from ._drafts import Accepted, Drafting, PromptLookup, start_drafting
from ._loop import trim
from ._model import separated
from ._options import Options, options_for
from ._prefill import compiled_size, prefill_rows
from ._prompts import Prompt, read_prompt
from ._result import FinishReason, check_finite
from ._sampling import Sampling, check_supported
from ._state import DecodingState
from .sampling import draw


class Speculation(eqx.Module):
    """The result of [`mamba_eqx.speculate`][].

    - `tokens`: the new token ids, of shape `(max_new_tokens,)`, without the prompt. A stop token is
        included, as the last token. Padded with -1, which is not a token id.
    - `length`: the number of real tokens.
    - `log_probs`: the model's own log-probability of each token, in nats, before penalties, bias,
        temperature and filters. Of shape `(max_new_tokens,)`; 0 in the padding.
    - `finish`: why the text ended, a value of [`mamba_eqx.generation.FinishReason`][].
    - `state`: the state after these tokens, to continue from.
    - `proposed`: the number of tokens that the draft proposed.
    - `accepted`: the number of proposed tokens that the model accepted. Every round also adds one
        token that the model itself has chosen.
    """

    tokens: Int[Array, " new"]
    length: Int[Array, ""]
    log_probs: Float[Array, " new"]
    finish: Int[Array, ""]
    state: DecodingState
    proposed: Int[Array, ""]
    accepted: Int[Array, ""]


def speculate(
    model: LanguageModel,
    draft: LanguageModel | PromptLookup,
    prompt: Prompt | None,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    lookahead: int = 4,
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
) -> Speculation:
    r"""Continues one prompt like `generate`, accelerated by a draft.

    Greedy decoding gives the tokens of `generate` (except for ties within rounding errors);
    sampling draws from the same distribution.

    The draft proposes `lookahead` tokens, and the model reads all of them at once, by `scan`. A
    proposed token $d$ is accepted with the probability $\min(1, p(d) / q(d))$, where $p$ is the
    model's distribution and $q$ the draft's, both after all options. The first rejected token is
    replaced by one drawn from $\max(p - q, 0)$; if all are accepted, another one is drawn from $p$.

    Rejected tokens are undone by keeping the state before the proposed tokens. This state is
    advanced over the accepted tokens while the next proposals are read: one `scan`, mapped over two
    lengths, reads the weights once.

    The speed-up depends on the number of accepted tokens and on the cost of the draft: see
    [the page on speed](../speed.md).

    Reference: Leviathan, Kalman and Matias, *Fast Inference from Transformers via Speculative
    Decoding* (2023), algorithm 1.

    **Arguments:**

    - `model`: the model.
    - `draft`: a smaller model with the same vocabulary, or a
        [`mamba_eqx.generation.PromptLookup`][].
    - `prompt`: one sequence of token ids. `None` (only together with `state`) adds no tokens and
        continues from the state.
    - `max_new_tokens`: the maximum number of tokens to generate, at least 1.
    - `sampling`: how to choose tokens, and where the text ends: a [`mamba_eqx.Sampling`][] without
        options per row and without `stop_strings`. Greedy by default.
    - `lookahead`: the number of tokens that the draft proposes in each round, at least 1. Another
        value recompiles.
    - `state`: the state of an earlier generation, to start from instead of the empty past. A draft
        model has not read the text before the state, and starts from its last token.
    - `key`: the key of the random numbers, required if the temperature is positive.

    **Returns:**

    A [`mamba_eqx.generation.Speculation`][].

    **Raises:** `ValueError` in the same cases as `generate`, for several prompts, for
    `stop_strings`, and if the vocabularies differ.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("lookahead", lookahead)
    if isinstance(draft, LanguageModel) and draft.vocab_size != model.vocab_size:
        raise ValueError(
            "The draft and the model must have the same vocabulary, but got vocab_size="
            f"{draft.vocab_size} and vocab_size={model.vocab_size}. Use a draft that was trained "
            "with the model's tokenizer."
        )
    check_supported("speculate", sampling, ("constraint", "stop_strings"))
    rows = read_prompt(model.vocab_size, "speculate", prompt, state)
    options = options_for(sampling, model.vocab_size, rows.size, key)
    # Proposed tokens are written into caches before it is known whether they are accepted.
    room = max_new_tokens + 2 * lookahead + 1
    begin = prefill_rows(model, rows, state, room=room, window=options.window)
    drafting = start_drafting(draft, model.vocab_size, rows.tokens[0], state, room)
    out = _speculate(
        separated(model),
        drafting,
        begin,
        options,
        limit=jnp.asarray(max_new_tokens, jnp.int32),
        size=compiled_size(max_new_tokens),
        lookahead=lookahead,
    )
    check_finite(out.finish, out.state.position + 1)
    return trim(out, max_new_tokens)


class _Rounds(eqx.Module):
    """The carry of the loop over rounds."""

    layers: PyTree
    memory: PyTree
    accepted: Accepted
    tokens: Int[Array, " buffer"]
    log_probs: Float[Array, " buffer"]
    length: Int[Array, ""]
    finish: Int[Array, ""]
    num_proposed: Int[Array, ""]
    num_accepted: Int[Array, ""]


class _Reading(NamedTuple):
    """The logits after each proposed token, and the layer states after the accepted tokens."""

    logits: Float[Array, "candidates vocab"]
    layers: PyTree


def _read(
    model: LanguageModel, layers: PyTree, accepted: Accepted, proposed: Int[Array, " lookahead"]
) -> _Reading:
    """Reads the accepted and the proposed tokens together."""
    lookahead = len(proposed)
    together = jnp.pad(accepted.tokens, (0, lookahead))
    together = lax.dynamic_update_slice(together, proposed, (accepted.count,))
    # The map over two lengths reads the weights once. The full length gives the logits; the length
    # of the accepted tokens gives the state.
    features, layers = jax.vmap(lambda length: model.backbone(together, layers, length=length))(
        jnp.stack([accepted.count + lookahead, accepted.count])
    )
    layers = jax.tree.map(lambda leaf: leaf[1], layers)
    features = lax.dynamic_slice_in_dim(features[0], accepted.count - 1, lookahead + 1)
    return _Reading(model.logits(features)[:, : model.vocab_size], layers)


def _verify(
    p: Float[Array, "candidates vocab"],
    q: Float[Array, "lookahead vocab"],
    proposed: Int[Array, " lookahead"],
    accept_key: PRNGKeyArray,
    token_key: PRNGKeyArray,
) -> tuple[Int[Array, ""], Int[Array, " candidates"]]:
    """Accepts or rejects the proposed tokens.

    **Returns:**

    The number of accepted tokens, and the proposed tokens with the model's own token
    after the accepted ones.
    """
    at = jnp.arange(len(proposed))
    u = jr.uniform(accept_key, proposed.shape, p.dtype)
    accept = u * q[at, proposed] < p[at, proposed]
    count = jnp.sum(jnp.cumprod(accept.astype(jnp.int32)))
    rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0)[count]
    # Rounding can leave nothing of the difference. Then the two distributions are equal.
    rest = jnp.where(jnp.sum(rest) > 0, rest, p[count])
    own = draw(jnp.log(rest), token_key)
    return count, jnp.pad(proposed, (0, 1)).at[count].set(own)


@eqx.filter_jit
def _speculate(
    model: LanguageModel,
    drafting: Drafting,
    state: DecodingState,
    options: Options,
    *,
    limit: Int[Array, ""],
    size: int,
    lookahead: int,
) -> Speculation:
    zero = jnp.zeros((), jnp.int32)
    window = state.recent.shape[0]
    # Greedy decoding does not depend on the key.
    key = jr.key(0) if options.key is None else options.key

    def is_running(now: _Rounds) -> Bool[Array, ""]:
        return (now.length < limit) & (now.finish == FinishReason.LENGTH)

    def run_round(now: _Rounds) -> _Rounds:
        accepted = now.accepted
        round_key = jr.fold_in(key, state.position + now.length)
        draft_key, accept_key, token_key = jr.split(round_key, 3)
        proposed, q_logits, memory = drafting.drafter.propose(
            now.memory, accepted, options, draft_key, lookahead
        )
        logits, layers = _read(model, now.layers, accepted, proposed)
        recent = jnp.concatenate([accepted.recent, proposed])
        windows = jnp.stack([recent[i : i + window] for i in range(lookahead + 1)])
        p = jax.nn.softmax(jax.vmap(options.distribution)(logits, windows))
        q = jax.nn.softmax(q_logits.astype(p.dtype))
        count, new = _verify(p, q, proposed, accept_key, token_key)

        index = jnp.arange(lookahead + 1)
        kept = jnp.minimum(count + 1, limit - now.length)
        stops = options.stopping.is_stop_token(new) & (index < kept)
        kept = jnp.where(jnp.any(stops), jnp.argmax(stops) + 1, kept).astype(jnp.int32)
        log_probs = jax.nn.log_softmax(logits)[index, new].astype(jnp.float32)
        bad = jnp.isnan(log_probs) & (index < kept)
        kept = jnp.where(jnp.any(bad), jnp.argmax(bad), kept).astype(jnp.int32)
        finish = jnp.where(jnp.any(stops), FinishReason.STOP_TOKEN, FinishReason.LENGTH)
        finish = jnp.where(jnp.any(bad), FinishReason.NOT_FINITE, finish).astype(jnp.int32)
        new = jnp.where(index < kept, new, -1).astype(jnp.int32)
        recent = lax.dynamic_slice(jnp.concatenate([accepted.recent, new]), (kept,), (window,))

        def write(buffer: Array, values: Array) -> Array:
            return lax.dynamic_update_slice(buffer, values, (now.length,))

        return _Rounds(
            layers=layers,
            memory=memory,
            accepted=Accepted(jnp.maximum(new, 0), kept, recent),
            tokens=write(now.tokens, new),
            log_probs=write(now.log_probs, jnp.where(index < kept, log_probs, 0)),
            length=now.length + kept,
            finish=finish,
            num_proposed=now.num_proposed + lookahead,
            num_accepted=now.num_accepted + jnp.minimum(count, kept).astype(jnp.int32),
        )

    begin = _Rounds(
        layers=state.layers,
        memory=drafting.memory,
        accepted=Accepted(jnp.pad(state.token[None], (0, lookahead)), zero + 1, state.recent),
        tokens=jnp.full(size + lookahead + 1, -1, jnp.int32),
        log_probs=jnp.zeros(size + lookahead + 1, jnp.float32),
        length=zero,
        finish=zero,
        num_proposed=zero,
        num_accepted=zero,
    )
    end = lax.while_loop(is_running, run_round, begin)
    last = end.accepted.count - 1
    _, layers = model.backbone(end.accepted.tokens, end.layers, length=last)
    return Speculation(
        tokens=end.tokens,
        length=end.length,
        log_probs=end.log_probs,
        finish=end.finish,
        state=DecodingState(
            layers, end.accepted.tokens[last], state.position + end.length, end.accepted.recent
        ),
        proposed=end.num_proposed,
        accepted=end.num_accepted,
    )
