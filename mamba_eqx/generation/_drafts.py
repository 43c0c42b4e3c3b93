"""Drafts, which cheaply propose tokens that `speculate` checks with the model."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_count
from ..models import LanguageModel
from ._model import separated
from ._options import Options
from ._prefill import compiled_size, prefill_rows
from ._prompts import Rows
from ._state import DecodingState
from .sampling import draw


class PromptLookup(eqx.Module):
    """A draft for [`mamba_eqx.speculate`][] that needs no second model.

    The proposed tokens are those that followed the most recent earlier occurrence of the last
    `ngram` tokens. If fewer tokens followed than are needed, they are repeated cyclically. Such
    proposals cost almost nothing, and suit texts that repeat parts of the prompt, such as summaries
    or edited code.

    Reference: Saxena, *Prompt Lookup Decoding* (2023).

    **Arguments:**

    - `ngram`: the number of trailing tokens that must match, at least 1. Default: 2.

    **Raises:** `ValueError` if `ngram` is less than 1.
    """

    ngram: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        check_count("ngram", self.ngram)


class Accepted(eqx.Module):
    """The accepted tokens of the previous round, which the layer states have not consumed yet."""

    tokens: Int[Array, " round"]
    count: Int[Array, ""]
    """The number of accepted tokens; the others are padding."""
    recent: Int[Array, " window"]
    """The last tokens of the text, including the accepted ones, for the penalties."""


class Proposal(NamedTuple):
    """The proposed tokens, the logits of the distribution that each was drawn from, and the
    drafter's memory after the accepted tokens (without the proposed ones)."""

    tokens: Int[Array, " lookahead"]
    logits: Float[Array, "lookahead vocab"]
    memory: PyTree


class AbstractDrafter(eqx.Module):
    """A draft within the compiled loop."""

    @abc.abstractmethod
    def propose(
        self, memory: PyTree, accepted: Accepted, options: Options, key: PRNGKeyArray, size: int
    ) -> Proposal:
        """Proposes `size` tokens that follow the accepted ones."""


class Drafting(NamedTuple):
    """A drafter and its memory after the prompt."""

    drafter: AbstractDrafter
    memory: PyTree


def start_drafting(
    draft: LanguageModel | PromptLookup,
    vocab_size: int,
    prompt: np.ndarray,
    state: DecodingState | None,
    room: int,
) -> Drafting:
    """Runs a draft over the prompt, and reserves capacity for `room` more tokens."""
    if isinstance(draft, LanguageModel):
        # The draft model has no state for the text before `state`, except for its last token.
        seen = prompt if state is None else np.append(np.asarray(state.token), prompt)
        read = prefill_rows(draft, Rows([seen], batched=False), None, room=room)
        return Drafting(_ModelDrafter(separated(draft)), read.layers)
    past = prompt if state is None else np.append(np.asarray(state.recent), prompt)
    return Drafting(_LookupDrafter(draft.ngram, vocab_size), _History.before_last(past, room))


class _Drawn(NamedTuple):
    """The state of the draft model between two proposed tokens."""

    logits: Float[Array, " vocab"]
    layers: PyTree
    recent: Int[Array, " window"]


class _ModelDrafter(AbstractDrafter):
    """A draft model. Its memory is the state of its layers."""

    model: LanguageModel

    def propose(
        self, memory: PyTree, accepted: Accepted, options: Options, key: PRNGKeyArray, size: int
    ) -> Proposal:
        features, memory = self.model.backbone(accepted.tokens, memory, length=accepted.count)
        logits = self.model.logits(features[accepted.count - 1])[: self.model.vocab_size]

        def draw_next(now: _Drawn, key: PRNGKeyArray) -> tuple[_Drawn, tuple[Array, Array]]:
            q = options.distribution(now.logits, now.recent)
            token = draw(q, key)
            recent = jnp.concatenate([now.recent[1:], token[None]])
            logits, layers = self.model.step(token, now.layers)
            return _Drawn(logits[: self.model.vocab_size], layers, recent), (token, q)

        start = _Drawn(logits, memory, accepted.recent)
        _, (tokens, q) = lax.scan(draw_next, start, jr.split(key, size))
        return Proposal(tokens, q, memory)


class _History(eqx.Module):
    """The tokens of the text so far, padded."""

    tokens: Int[Array, " history"]
    count: Int[Array, ""]

    @classmethod
    def before_last(cls, past: np.ndarray, room: int) -> "_History":
        """Returns the history of all tokens but the last, which is accepted in the first round.

        **Arguments:**

        - `past`: the token ids of the text so far.
        - `room`: the number of further tokens to reserve capacity for.
        """
        padded = np.full(compiled_size(len(past) + room), -1, np.int32)
        padded[: len(past)] = past
        return cls(jnp.asarray(padded), jnp.asarray(len(past) - 1, jnp.int32))


class _LookupDrafter(AbstractDrafter):
    """A prompt lookup. Its memory is the history of the text."""

    ngram: int = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)

    def propose(
        self, memory: _History, accepted: Accepted, options: Options, key: PRNGKeyArray, size: int
    ) -> Proposal:
        del options, key
        tokens = lax.dynamic_update_slice(memory.tokens, accepted.tokens, (memory.count,))
        count = memory.count + accepted.count
        at = jnp.arange(len(tokens))
        # `matches` marks the places before the last tokens where the same tokens occurred.
        matches = at < count - self.ngram
        for i in range(self.ngram):
            matches = matches & (jnp.roll(tokens, -i) == tokens[count - self.ngram + i])
        found = jnp.max(jnp.where(matches, at, 0)) + self.ngram
        # The proposal is the text from there to its end, repeated cyclically.
        ahead = jnp.arange(size) % jnp.maximum(count - found, 1)
        proposed = jnp.maximum(tokens[found + ahead], 0)
        q = jnp.where(jax.nn.one_hot(proposed, self.vocab_size, dtype=bool), 0.0, -jnp.inf)
        return Proposal(proposed, q, _History(tokens, count))
