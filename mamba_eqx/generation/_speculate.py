"""Several tokens for one reading of the weights: a cheap draft, checked by the model."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_count
from ..models import LanguageModel
from ._loop import trim
from ._options import Options, options_for
from ._prefill import compiled_size, prefill_rows
from ._prompts import Prompt, Rows, read_prompt
from ._result import FinishReason
from ._sampling import GREEDY, Sampling, check_supported
from ._state import DecodingState
from .sampling import draw


class PromptLookup(eqx.Module):
    """Drafts by looking up how the text went on the last time that it said the same: for texts that
    repeat what is in the prompt, such as summaries or edited code. It costs nothing. Where what was
    found ends with the text, it is taken to be repeated.

    Reference: Saxena, *Prompt Lookup Decoding* (2023).
    """

    ngram: int = eqx.field(static=True, default=2)
    """How many tokens have to be the same."""

    def __check_init__(self):
        check_count("ngram", self.ngram)


class Speculation(eqx.Module):
    """What [`mamba_eqx.speculate`][] returns: `tokens`, `length`, `log_probs`, `finish` and `state`
    as a [`mamba_eqx.Generation`][] has them, and

    - `proposed`: how many tokens the draft proposed.
    - `accepted`: how many of them the model accepted. Every round also gives one token of its own.
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
    sampling: Sampling = GREEDY,
    *,
    lookahead: int = 4,
    state: DecodingState | None = None,
    key: PRNGKeyArray | None = None,
) -> Speculation:
    r"""Continues one prompt as `generate` does, with the help of a draft: greedily the same tokens
    (but for ties within rounding), by sampling the same distribution.

    The draft proposes `lookahead` tokens, and the model reads them all at once, by `scan`. A token
    $d$ is accepted with the probability $\min(1, p(d) / q(d))$, $p$ being the model's distribution
    and $q$ the draft's, both after all options; the first that is not is replaced by one drawn from
    $\max(p - q, 0)$, and if all are accepted there is one more, drawn from $p$.

    Going back from rejected tokens is no more than keeping the state from before them. It is
    brought forward over the accepted ones while the next proposals are read: one `scan`, mapped
    over two lengths, reads the weights once.

    Whether it is faster depends on how many tokens are accepted and on what the draft costs: see
    [the page on speed](../speed.md).

    Reference: Leviathan, Kalman and Matias, *Fast Inference from Transformers via Speculative
    Decoding* (2023), algorithm 1.

    **Arguments:**

    - `draft`: a smaller model of the same vocabulary, or [`mamba_eqx.generation.PromptLookup`][].
    - `lookahead`: how many tokens are proposed at a time. Another value recompiles.
    - the others as for [`mamba_eqx.generate`][], for one prompt. With a `state` and a model as
        draft, the draft has not seen what the state stands for, and starts afresh.

    **Returns:** a [`mamba_eqx.generation.Speculation`][].

    **Raises:** `ValueError` as `generate`, and if the vocabularies differ.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("lookahead", lookahead)
    if isinstance(draft, LanguageModel) and draft.vocab_size != model.vocab_size:
        raise ValueError(
            "The draft and the model must have the same tokens, but got vocab_size="
            f"{draft.vocab_size} and vocab_size={model.vocab_size}."
        )
    check_supported("speculate", sampling, ("stop_strings",))
    rows = read_prompt(model.vocab_size, "speculate", prompt, state)
    options = options_for(sampling, model.vocab_size, rows.size, key)
    # Proposed tokens are written into caches before it is known whether they are accepted.
    room = max_new_tokens + 2 * lookahead + 1
    begin = prefill_rows(model, rows, state, room=room, window=options.window)
    (row,) = rows.tokens
    if isinstance(draft, LanguageModel):
        seen = row if state is None else np.append(np.asarray(state.token), row)
        drafter = _ModelDraft(draft)
        memory = prefill_rows(draft, Rows([seen], batched=False), None, room=room).layers
    else:
        drafter = _LookupDraft(draft.ngram, model.vocab_size)
        past = row if state is None else np.append(np.asarray(state.recent), row)
        memory = _History.of(past, room)
    out = _speculate(
        model,
        drafter,
        memory,
        begin,
        options,
        jr.key(0) if options.key is None else options.key,
        jnp.asarray(max_new_tokens, jnp.int32),
        compiled_size(max_new_tokens),
        lookahead,
    )
    return trim(out, max_new_tokens)


class _Past(eqx.Module):
    """Tokens that are certain, but which the states have not seen: the last round's."""

    tokens: Int[Array, " round"]
    count: Int[Array, ""]
    recent: Int[Array, " window"]


class _AbstractDraft(eqx.Module):
    @abc.abstractmethod
    def propose(
        self, memory: PyTree, past: _Past, options: Options, key: PRNGKeyArray, lookahead: int
    ) -> tuple[Int[Array, " lookahead"], Float[Array, "lookahead vocab"], PyTree]:
        """Tokens, the logits of the distributions they were drawn from, and the memory after
        `past`."""


class _ModelDraft(_AbstractDraft):
    model: LanguageModel

    def propose(
        self, memory: PyTree, past: _Past, options: Options, key: PRNGKeyArray, lookahead: int
    ) -> tuple[Int[Array, " lookahead"], Float[Array, "lookahead vocab"], PyTree]:
        features, memory = self.model.backbone(past.tokens, memory, length=past.count)
        logits = self.model.logits(features[past.count - 1])[: self.model.vocab_size]

        def one(carry: tuple[Array, PyTree, Array], key: Array) -> tuple[Any, Any]:
            logits, layers, recent = carry
            q = options.distribution(logits, recent)
            token = draw(q, key)
            recent = jnp.concatenate([recent[1:], token[None]])
            logits, layers = self.model.step(token, layers)
            return (logits[: self.model.vocab_size], layers, recent), (token, q)

        carry = (logits, memory, past.recent)
        _, (tokens, q) = lax.scan(one, carry, jr.split(key, lookahead))
        return tokens, q, memory


class _History(eqx.Module):
    tokens: Int[Array, " history"]
    count: Int[Array, ""]

    @classmethod
    def of(cls, past: np.ndarray, room: int) -> "_History":
        """All but the last token, which is the first of the `_Past`."""
        padded = np.full(compiled_size(len(past) + room), -1, np.int32)
        padded[: len(past)] = past
        return cls(jnp.asarray(padded), jnp.asarray(len(past) - 1, jnp.int32))


class _LookupDraft(_AbstractDraft):
    ngram: int = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)

    def propose(
        self, memory: PyTree, past: _Past, options: Options, key: PRNGKeyArray, lookahead: int
    ) -> tuple[Int[Array, " lookahead"], Float[Array, "lookahead vocab"], PyTree]:
        del options, key
        tokens = lax.dynamic_update_slice(memory.tokens, past.tokens, (memory.count,))
        count = memory.count + past.count
        at = jnp.arange(len(tokens))
        # Where the last tokens occurred before.
        same = at < count - self.ngram
        for i in range(self.ngram):
            same = same & (jnp.roll(tokens, -i) == tokens[count - self.ngram + i])
        found = jnp.max(jnp.where(same, at, 0)) + self.ngram
        # From there to the end of the text, and the same again.
        ahead = jnp.arange(lookahead) % jnp.maximum(count - found, 1)
        proposed = jnp.maximum(tokens[found + ahead], 0)
        q = jnp.where(jax.nn.one_hot(proposed, self.vocab_size, dtype=bool), 0.0, -jnp.inf)
        return proposed, q, _History(tokens, count)


class _Rounds(eqx.Module):
    layers: PyTree
    memory: PyTree
    past: _Past
    tokens: Int[Array, " buffer"]
    log_probs: Float[Array, " buffer"]
    length: Int[Array, ""]
    finish: Int[Array, ""]
    proposed: Int[Array, ""]
    accepted: Int[Array, ""]


@eqx.filter_jit
def _speculate(
    model: LanguageModel,
    drafter: _AbstractDraft,
    memory: PyTree,
    state: DecodingState,
    options: Options,
    key: PRNGKeyArray,
    limit: Int[Array, ""],
    size: int,
    lookahead: int,
) -> Speculation:
    zero = jnp.zeros((), jnp.int32)
    window = state.recent.shape[0]

    def go_on(now: _Rounds) -> Bool[Array, ""]:
        return (now.length < limit) & (now.finish == FinishReason.LENGTH)

    def body(now: _Rounds) -> _Rounds:
        past = now.past
        round_key = jr.fold_in(key, state.position + now.length)
        draft_key, accept_key, token_key = jr.split(round_key, 3)
        proposed, q_logits, memory = drafter.propose(
            now.memory, past, options, draft_key, lookahead
        )
        together = jnp.pad(past.tokens, (0, lookahead))
        together = lax.dynamic_update_slice(together, proposed, (past.count,))
        # Mapped over two lengths: to the end, for the logits, and over what is certain, for the
        # state. The weights are read once.
        features, layers = jax.vmap(
            lambda length: model.backbone(together, now.layers, length=length)
        )(jnp.stack([past.count + lookahead, past.count]))
        layers = jax.tree.map(lambda leaf: leaf[1], layers)
        features = lax.dynamic_slice_in_dim(features[0], past.count - 1, lookahead + 1)
        logits = model.logits(features)[:, : model.vocab_size]
        recent = jnp.concatenate([past.recent, proposed])
        windows = jnp.stack([recent[i : i + window] for i in range(lookahead + 1)])
        p = jax.nn.softmax(jax.vmap(options.distribution)(logits, windows))
        q = jax.nn.softmax(q_logits.astype(p.dtype))

        at = jnp.arange(lookahead)
        u = jr.uniform(accept_key, (lookahead,), p.dtype)
        accept = u * q[at, proposed] < p[at, proposed]
        count = jnp.sum(jnp.cumprod(accept.astype(jnp.int32)))
        rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0)[count]
        # Where rounding leaves nothing of it, the two distributions are one.
        rest = jnp.where(jnp.sum(rest) > 0, rest, p[count])
        own = draw(jnp.log(rest), token_key)
        new = jnp.pad(proposed, (0, 1)).at[count].set(own)

        index = jnp.arange(lookahead + 1)
        kept = jnp.minimum(count + 1, limit - now.length)
        stops = options.stopping.is_stop_token(new) & (index < kept)
        kept = jnp.where(jnp.any(stops), jnp.argmax(stops) + 1, kept).astype(jnp.int32)
        log_probs = jax.nn.log_softmax(logits)[index, new].astype(jnp.float32)
        write = lambda buffer, values: lax.dynamic_update_slice(buffer, values, (now.length,))  # noqa: E731
        new = jnp.where(index < kept, new, -1).astype(jnp.int32)
        recent = lax.dynamic_slice(jnp.concatenate([past.recent, new]), (kept,), (window,))
        return _Rounds(
            layers=layers,
            memory=memory,
            past=_Past(jnp.maximum(new, 0), kept, recent),
            tokens=write(now.tokens, new),
            log_probs=write(now.log_probs, jnp.where(index < kept, log_probs, 0)),
            length=now.length + kept,
            finish=jnp.where(jnp.any(stops), FinishReason.STOP_TOKEN, 0).astype(jnp.int32),
            proposed=now.proposed + lookahead,
            accepted=now.accepted + jnp.minimum(count, kept).astype(jnp.int32),
        )

    begin = _Rounds(
        layers=state.layers,
        memory=memory,
        past=_Past(jnp.pad(state.token[None], (0, lookahead)), zero + 1, state.recent),
        tokens=jnp.full(size + lookahead + 1, -1, jnp.int32),
        log_probs=jnp.zeros(size + lookahead + 1, jnp.float32),
        length=zero,
        finish=zero,
        proposed=zero,
        accepted=zero,
    )
    end = lax.while_loop(go_on, body, begin)
    last = end.past.count - 1
    _, layers = model.backbone(end.past.tokens, end.layers, length=last)
    return Speculation(
        tokens=end.tokens,
        length=end.length,
        log_probs=end.log_probs,
        finish=end.finish,
        state=DecodingState(
            layers, end.past.tokens[last], state.position + end.length, end.past.recent
        ),
        proposed=end.proposed,
        accepted=end.accepted,
    )
