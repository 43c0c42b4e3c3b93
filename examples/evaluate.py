"""Evaluates a model with lm-evaluation-harness; the default tasks need no network.

    pip install ".[eval]"
    python examples/evaluate.py                                     # the bundled model
    python examples/evaluate.py --model state-spaces/mamba-130m-hf --tasks lambada_openai

`harness_model.py` adapts a `mbx.LanguageModel` to the harness. The tasks in this file are made from
a play that the bundled model has not seen: choosing the next line, naming the next speaker, and
predicting the whole text.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jax.numpy as jnp

import mamba_eqx as mbx


if TYPE_CHECKING:
    from lm_eval.api.model import LM


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"
PLAY = 1000  # Characters of the play that are scored for each example of the other tasks.


def held_out_play() -> str:
    """Returns the text of the play that the bundled model has not seen."""
    documents = lzma.decompress(CORPUS.read_bytes()).decode("utf-8").split("\0")
    return next(text for text in documents if text.startswith("TWELFTH NIGHT"))


def local_tasks(count: int) -> list[dict[str, object]]:
    """Returns three tasks on the held-out play, with about `count` examples each."""
    from datasets import Dataset

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
    lm: "LM", tasks: Sequence[str | dict[str, object]], limit: int | None = None
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
    mbx.use_compilation_cache()
    # After the options, so that `--help` needs no other package.
    try:
        from harness_model import HarnessModel
    except ImportError:
        print('This example requires lm_eval: pip install "mamba_eqx[eval]".', file=sys.stderr)
        raise SystemExit(2) from None
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
