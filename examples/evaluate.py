"""Evaluates a model with lm-evaluation-harness; the default tasks need no network.

    pip install ".[eval]"
    python examples/evaluate.py                                     # the bundled model
    python examples/evaluate.py --model state-spaces/mamba-130m-hf --tasks lambada_openai

`HarnessModel` adapts a `mbx.LanguageModel` to the harness: log-probabilities of continuations and
of whole texts, and generation up to a stop string. Continuations run in batches of similar lengths,
padded to a power of two to limit recompilation. A state-space model has no maximum length, so a
document is one sequence, however long.

The tasks in this file are made from a play that the bundled model has not seen: choosing the next
line, naming the next speaker, and predicting the whole text.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


try:
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, TemplateLM
except ImportError:
    print('This example requires lm_eval: pip install "mamba_eqx[eval]".', file=sys.stderr)
    raise SystemExit(2) from None

import mamba_eqx as mbx


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"
PLAY = 1000  # Characters of the play that are scored for each example of the other tasks.
SEPARATOR = 0  # The byte between documents in the training text of `train_lm.py`.


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


def held_out_play() -> str:
    """Returns the text of the play that the bundled model has not seen."""
    documents = lzma.decompress(CORPUS.read_bytes()).decode("utf-8").split("\0")
    return next(text for text in documents if text.startswith("TWELFTH NIGHT"))


def local_tasks(count: int) -> list[dict[str, object]]:
    """Returns three tasks on the held-out play, with about `count` examples each."""
    play = held_out_play()
    speeches = [s for s in play.split("\n\n") if s.count("\n") > 1 and ":\n" in s][5:]
    lines: list[dict[str, object]] = []
    speakers: list[dict[str, object]] = []
    for i in range(0, min(len(speeches) - 10, 7 * count), 7):
        first, second, rest = speeches[i].split("\n", 2)
        next_line = rest.split("\n")[0]
        others = [speeches[i + j].split("\n")[1] for j in (3, 5, 6)]
        context = f"{first}\n{second}\n"
        lines.append({"context": context, "choices": [next_line, *others], "right": 0})
        before = "\n\n".join(speeches[i : i + 3])
        speakers.append({"context": f"{before}\n\n", "right": speeches[i + 3].split(":")[0]})
    shared = {"test_split": "test", "num_fewshot": 0, "doc_to_text": "{{context}}"}

    def task(
        name: str,
        rows: list[dict[str, object]],
        output_type: str,
        metric: str,
        options: Mapping[str, object],
    ) -> dict[str, object]:
        dataset = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
        fields = {"task": name, "output_type": output_type, "metric_list": [{"metric": metric}]}
        return {**fields, **dataset, **shared, **options}

    generation = {"until": [":"], "max_gen_toks": 24, "do_sample": False}
    choice = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}", "target_delimiter": ""}
    text = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    named = {"doc_to_target": "{{right}}", "generation_kwargs": generation}
    plays: list[dict[str, object]] = [{"text": play[: PLAY * count]}]
    return [
        task("next_line", lines, "multiple_choice", "acc", choice),
        task("next_speaker", speakers, "generate_until", "exact_match", named),
        task("the_play", plays, "loglikelihood_rolling", "bits_per_byte", text),
    ]


def evaluate(
    lm: LM, tasks: Sequence[str | dict[str, object]], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Runs tasks and returns their metrics, by the name of the task."""
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(lm, tasks=[*tasks], limit=limit, log_samples=False, bootstrap_iters=0)
    # `None` is the result of secondary processes, and there is only one process.
    assert found is not None
    assert "results" in found
    return {
        task: {name: float(v) for name, v in values.items() if isinstance(v, int | float)}
        for task, values in found["results"].items()
    }


def positive(text: str) -> int:
    """The type of the options that are counts."""
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer, but got {text}")
    return int(text)


def fail(option: str, error: Exception) -> NoReturn:
    """Ends the process with one line about an option that cannot be used."""
    print(f"evaluate.py: error: {option}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default=str(mbx.SHIPPED),
        help="checkpoint folder, or repository on the Hub (default: the bundled model)",
    )
    parser.add_argument(
        "--tasks", nargs="*", help="tasks of the harness (default: those of this file)"
    )
    parser.add_argument("--limit", type=positive, help="maximum number of examples per task")
    parser.add_argument(
        "--count",
        type=positive,
        default=100,
        help="number of examples in the tasks of this file, which score 1000 characters of the "
        "play for each of them (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        help="number of requests per batch (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        model = mbx.from_pretrained(args.model, dtype=jnp.float32)
        tokenizer = mbx.load_tokenizer(args.model)
    except (ValueError, OSError, ImportError) as error:
        fail("--model", error)
    tasks = args.tasks or local_tasks(args.count)
    try:
        found = evaluate(HarnessModel(model, tokenizer, args.batch), tasks, args.limit)
    except (ValueError, OSError, KeyError) as error:
        fail("--tasks", error)
    print(json.dumps(found, indent=2))
    if not args.tasks:
        whole = len(held_out_play())
        scored = min(whole, PLAY * args.count)
        print(f"the_play: {scored:,} of {whole:,} characters were scored (--count)")


if __name__ == "__main__":
    main()
