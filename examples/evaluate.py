"""Evaluate a model by the tasks of lm-evaluation-harness, without a network.

    pip install ".[eval]"
    python examples/evaluate.py                                     # the model that ships
    python examples/evaluate.py --model state-spaces/mamba-130m-hf --tasks lambada_openai

`Evaluated` is a `mbx.LanguageModel` as the harness wants it: probabilities of continuations and of
whole texts, and text up to a stop. Requests run in batches of similar lengths, each padded to a
power of two, so that little is compiled. A state-space model has no longest length: a document is
one sequence, however long.

The tasks that come with this file are made of a play that the model that ships has not seen: which
line comes next, who speaks next, and how well the whole is predicted.
"""

import argparse
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from jax import lax
from lm_eval.api.model import TemplateLM

import mamba_eqx as mbx


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"


@eqx.filter_jit
def read_rows(model: mbx.LanguageModel, tokens: Any, targets: Any, lengths: Any) -> tuple[Any, Any]:
    """The log-probability of each target, and whether it is the most likely token."""

    def row(tokens: Any, targets: Any, length: Any) -> tuple[Any, Any]:
        def one(pair: tuple[Any, Any]) -> tuple[Any, Any]:
            feature, target = pair
            logits = model.logits(feature)[: model.vocab_size]
            return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

        features, _ = model.backbone(tokens, length=length)
        return lax.map(one, (features, targets), batch_size=64)

    return jax.vmap(row)(tokens, targets, lengths)


class Evaluated(TemplateLM):
    def __init__(self, model: mbx.LanguageModel, tokenizer: Any, batch: int = 8):
        super().__init__()
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.is_text = isinstance(tokenizer, mbx.TextTokenizer)

    @property
    def eot_token_id(self) -> int:
        # Of bytes: what separates documents in `train_lm.py`.
        end = self.tokenizer.end if self.is_text else 0
        if end is None:
            raise ValueError("The tokenizer names no token that ends a text (`eos_token`).")
        return end

    def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
        if self.is_text and add_special_tokens is False:
            return self.tokenizer.encode_piece(string)
        return self.tokenizer.encode(string)

    def batches(self, sizes: Sequence[int]) -> Iterator[np.ndarray]:
        """Indices of requests, the longest ones first: what needs most memory fails at once."""
        order = np.argsort([-size for size in sizes], kind="stable")
        for at in range(0, len(order), self.batch):
            yield order[at : at + self.batch]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
        rows = [context + continuation for _, context, continuation in requests]
        found: list[Any] = [None] * len(rows)
        for group in self.batches([len(row) for row in rows]):
            longest = max(len(rows[i]) for i in group)
            size = max(16, 1 << (longest - 2).bit_length())
            tokens = np.zeros((self.batch, size + 1), np.int32)
            for line, i in enumerate(group):
                tokens[line, : len(rows[i])] = rows[i]
            lengths = np.ones(self.batch, np.int32)
            lengths[: len(group)] = [len(rows[i]) - 1 for i in group]
            log_probs, best = read_rows(self.model, tokens[:, :-1], tokens[:, 1:], lengths)
            for line, i in enumerate(group):
                ours = slice(len(requests[i][1]) - 1, len(rows[i]) - 1)
                total = np.asarray(log_probs)[line, ours].sum(dtype=np.float64)
                found[i] = (float(total), bool(np.asarray(best)[line, ours].all()))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        texts = [
            [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for request in requests
        ]
        scores = (mbx.score(self.model, text) for text in texts)
        return [float(score.log_probs.sum(dtype=np.float64)) for score in scores]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for group in self.batches([len(prompt) for prompt in prompts]):
            options = requests[group[0]].args[1]  # of the task: those of all its requests
            stops = options.get("until", [])
            stops = [stops] if isinstance(stops, str) else list(stops)
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError("Only greedy decoding: `do_sample: false` in the task.")
            out = mbx.generate(
                self.model,
                [prompts[i] for i in group],
                options.get("max_gen_toks", 256),
                mbx.Sampling(
                    stop_tokens=[self.eot_token_id], stop_strings=stops, tokenizer=self.tokenizer
                ),
            )
            for i, tokens, length in zip(group, out.tokens, out.length, strict=True):
                text = self.tokenizer.decode(tokens[: int(length)].tolist())
                ends = [text.find(stop) for stop in stops if stop in text]
                found[i] = text[: min(ends, default=len(text))].replace("\0", "")
        return found


def local_tasks(count: int) -> list[dict[str, Any]]:
    documents = lzma.decompress(CORPUS.read_bytes()).decode("utf-8").split("\0")
    play = next(text for text in documents if text.startswith("TWELFTH NIGHT"))
    speeches = [s for s in play.split("\n\n") if s.count("\n") > 1 and ":\n" in s][5:]
    lines, speakers = [], []
    for i in range(0, min(len(speeches) - 10, 7 * count), 7):
        first, second, rest = speeches[i].split("\n", 2)
        next_line = rest.split("\n")[0]
        others = [speeches[i + j].split("\n")[1] for j in (3, 5, 6)]
        context = f"{first}\n{second}\n"
        lines.append({"context": context, "choices": [next_line, *others], "right": 0})
        before = "\n\n".join(speeches[i : i + 3])
        speakers.append({"context": f"{before}\n\n", "right": speeches[i + 3].split(":")[0]})
    shared = {"test_split": "test", "num_fewshot": 0, "doc_to_text": "{{context}}"}

    def task(name: str, rows: list[Any], output: str, metric: str, **more: Any) -> dict[str, Any]:
        metrics = [{"metric": metric}]
        dataset = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
        fields = {"task": name, "output_type": output, "metric_list": metrics}
        return fields | dataset | shared | more

    generation = {"until": [":"], "max_gen_toks": 24, "do_sample": False}
    choice = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}", "target_delimiter": ""}
    text = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    named = {"doc_to_target": "{{right}}", "generation_kwargs": generation}
    plays = [{"text": play[: 1000 * count]}]
    return [
        task("next_line", lines, "multiple_choice", "acc", **choice),
        task("next_speaker", speakers, "generate_until", "exact_match", **named),
        task("the_play", plays, "loglikelihood_rolling", "bits_per_byte", **text),
    ]


def evaluate(lm: Any, tasks: list[Any], limit: int | None = None) -> dict[str, dict[str, float]]:
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(lm, tasks=tasks, limit=limit, log_samples=False, bootstrap_iters=0)
    is_metric = lambda value: isinstance(value, int | float)
    return {
        task: {name: float(v) for name, v in values.items() if is_metric(v)}
        for task, values in found["results"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=str(mbx.SHIPPED), help="a folder, or a repository on the Hub"
    )
    parser.add_argument("--tasks", nargs="*", help="of the harness (default: those of this file)")
    parser.add_argument("--limit", type=int, help="the most examples of each task")
    parser.add_argument("--count", type=int, default=100, help="how large the tasks here are")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    model = mbx.from_pretrained(args.model, dtype=jnp.float32)
    lm = Evaluated(model, mbx.load_tokenizer(args.model), args.batch)
    found = evaluate(lm, args.tasks or local_tasks(args.count), args.limit)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
