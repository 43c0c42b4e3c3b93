"""An adapter of a `mbx.LanguageModel` to lm-evaluation-harness. `evaluate.py` uses it.

The adapter gives log-probabilities of continuations and of whole texts, and generates up to a stop
string. Continuations run in batches of similar lengths, padded to a power of two to limit
recompilation. A state-space model has no maximum length, so a document is one sequence, however
long.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

import mamba_eqx as mbx


SEPARATOR = 0  # The byte between documents in the training text of `mamba-eqx train`.


@eqx.filter_jit
def score_targets(
    model: mbx.LanguageModel, tokens: Array, targets: Array, lengths: Array
) -> tuple[Array, Array]:
    """Scores the targets of a batch of shape `(batch, seq)`.

    Returns the log-probability of each target, and whether it is the most likely token.
    """

    def score_row(tokens: Array, targets: Array, length: Array) -> tuple[Array, Array]:
        def score_token(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            features, target = pair
            logits = model.logits(features)[: model.vocab_size]
            return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

        features, _ = model.backbone(tokens, length=length)
        return lax.map(score_token, (features, targets), batch_size=64)

    return jax.vmap(score_row)(tokens, targets, lengths)


class HarnessModel(TemplateLM):
    """An adapter of a language model to the interface of lm-evaluation-harness.

    - `batch`: the number of requests that run together.
    """

    def __init__(
        self,
        model: mbx.LanguageModel,
        tokenizer: mbx.TextTokenizer | mbx.ByteTokenizer,
        batch: int = 8,
    ):
        super().__init__()
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    @property
    def eot_token_id(self) -> int:
        if isinstance(self.tokenizer, mbx.ByteTokenizer):
            return SEPARATOR
        eos = self.tokenizer.eos_token_id
        ends = self.tokenizer.stop_tokens if eos is None else (eos,)
        if not ends:
            raise ValueError(
                "The tokenizer has no end-of-text token. Add `eos_token` to its "
                "tokenizer_config.json."
            )
        return ends[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        if isinstance(self.tokenizer, mbx.TextTokenizer) and add_special_tokens is False:
            return self.tokenizer.encode_piece(string)
        return self.tokenizer.encode(string)

    def batches(self, sizes: Mapping[int, int]) -> Iterator[list[int]]:
        """Yields requests, given with their sizes, in batches of similar sizes.

        The longest requests come first, so that a lack of memory shows immediately.
        """
        order = sorted(sizes, key=lambda i: -sizes[i])
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        rows = [context + continuation for _, context, continuation in requests]
        found = [(0.0, False)] * len(rows)
        for group in self.batches({i: len(row) for i, row in enumerate(rows)}):
            longest = max(len(rows[i]) for i in group)
            size = max(16, 1 << (longest - 2).bit_length())
            tokens = np.zeros((self.batch, size + 1), np.int32)
            for line, i in enumerate(group):
                tokens[line, : len(rows[i])] = rows[i]
            lengths = np.ones(self.batch, np.int32)
            lengths[: len(group)] = [len(rows[i]) - 1 for i in group]
            log_probs, is_best = score_targets(
                self.model,
                jnp.asarray(tokens[:, :-1]),
                jnp.asarray(tokens[:, 1:]),
                jnp.asarray(lengths),
            )
            for line, i in enumerate(group):
                continuation = slice(len(requests[i][1]) - 1, len(rows[i]) - 1)
                total = np.asarray(log_probs)[line, continuation].sum(dtype=np.float64)
                found[i] = (float(total), bool(np.asarray(is_best)[line, continuation].all()))
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [
            [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for request in requests
        ]
        scores = (mbx.score(self.model, text) for text in texts)
        return [float(score.log_probs.sum(dtype=np.float64)) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
        # Only requests with equal options run together. Those of two tasks can differ.
        alike: dict[Options, dict[int, int]] = {}
        for i, request in enumerate(requests):
            arguments: tuple[Any, ...] = request.args
            alike.setdefault(Options.read(arguments[1]), {})[i] = len(prompts[i])
        end = self.eot_token_id
        for options, sizes in alike.items():
            sampling = mbx.Sampling(
                stop_tokens=[end] if end < self.model.vocab_size else [],
                stop_strings=options.stops,
                tokenizer=self.tokenizer,
            ).for_model(self.model, self.tokenizer)
            for group in self.batches(sizes):
                rows = [prompts[i] for i in group]
                out = mbx.generate(self.model, rows, options.length, sampling)
                for i, tokens, length in zip(group, out.tokens, out.length, strict=True):
                    text = self.tokenizer.decode(tokens[: int(length)].tolist())
                    cuts = [text.find(stop) for stop in options.stops if stop in text]
                    found[i] = text[: min(cuts, default=len(text))].replace("\0", "")
        return found


class Options(NamedTuple):
    """The options of a request to generate text: texts to stop at, and the maximum length."""

    stops: tuple[str, ...]
    length: int

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Options":
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(
                "Only greedy decoding is supported. Set `do_sample: false` in the task."
            )
        stops = options.get("until") or []
        stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
        return cls(stops, options.get("max_gen_toks", 256))
