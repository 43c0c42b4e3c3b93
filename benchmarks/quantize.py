"""Measures weights of 8 and 4 bits: errors, bits per byte, size and speed.

    python benchmarks/quantize.py [--quick] [--no-peers] [--model DIR --text FILE]

- The errors are those of products with weights of a normal distribution, beside float64 and
  relative to the root mean square of the results.
- The bits per byte are those of a byte-level model on the end of a text; by default the bundled
  model on the play that it was not trained on, of which the first 32 KiB are taken.
- The speed is that of models in mamba-130m's shape with random weights.
"""

import argparse
import lzma
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _common import (
    Competitors,
    arguments,
    beside,
    compiled,
    model_130m,
    print_facts,
    print_table,
    random_tokens,
    temporary_mib,
    tiny_model,
)

import mamba_eqx as mbx
from mamba_eqx import training


CORPUS = Path(__file__).parents[1] / "examples" / "data" / "shakespeare.txt.xz"
HELD_OUT = b"TWELFTH NIGHT"
BITS: tuple[Literal[8, 4], ...] = (8, 4)

Variants = dict[str, Callable[[mbx.LanguageModel], mbx.LanguageModel]]


def variants(groups: tuple[int, ...]) -> Variants:
    """Returns the ways to store a model that are compared, the widest first."""
    found: Variants = {
        "float32": lambda model: model,
        "bfloat16": partial(mbx.cast, dtype=jnp.bfloat16),
    }
    for bits in BITS:
        for group in groups:
            name = f"{bits} bits, groups of {group}"
            found[name] = partial(mbx.quantize, bits=bits, group=group)
    return found


def errors(bits: Literal[8, 4], group: int, size: int) -> tuple[float, float, float]:
    """Returns the relative root mean square error of the rounded weights, and the mean and the
    maximum error of the products with the rounded weights, beside float64."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((2, size, size)).astype(np.float32)
    rounded = mbx.ops.quantize_weight(jnp.asarray(weight), bits=bits, group=group)
    got = np.asarray(mbx.ops.quantized_product(jnp.asarray(x), *rounded), np.float64)
    exact = np.asarray(mbx.ops.dequantize_weight(*rounded), np.float64)
    rounding = np.sqrt(np.mean((exact - weight) ** 2))
    want = x.astype(np.float64) @ exact.T
    off = np.abs(got - want) / np.sqrt(np.mean(want**2))
    return float(rounding), float(off.mean()), float(off.max())


def held_out(path: Path) -> np.ndarray:
    """Returns the bytes to score."""
    if path == CORPUS:
        works = lzma.decompress(path.read_bytes()).split(b"\0")
        play = next(work for work in works if work.startswith(HELD_OUT))
        return np.frombuffer(play, np.uint8)
    return training.hold_out_end(training.read_tokens(path), 0.05)[1]


def parameter_bytes(model: mbx.LanguageModel) -> int:
    """Returns the size of all parameters in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))


def bits_per_byte(model: mbx.LanguageModel, text: np.ndarray, rows: int = 16) -> float:
    """Scores a text as parallel sequences."""
    length = len(text) // rows
    texts = text[: rows * length].reshape(rows, length).astype(np.int32)
    scored = mbx.score(model, texts)
    total = scored.log_probs.sum(dtype=np.float64)
    return -float(total) / float(scored.length.sum()) / math.log(2)


def speeds(model: mbx.LanguageModel, ways: Variants, tokens: int, new: int) -> list[list[object]]:
    """Returns a row of the table for each way to store the model."""
    prompt = random_tokens(model, tokens)
    prefills: Competitors = {}
    decodings: dict[int, Competitors] = {1: {}, 8: {}}
    sizes, memory = {}, {}
    for name, way in ways.items():
        made = way(model)
        sizes[name] = parameter_bytes(made)
        prefills[name], executable = compiled(lambda m, t: m(t), made, prompt)
        memory[name] = temporary_mib(executable)
        for batch, runs in decodings.items():
            start = np.asarray(random_tokens(made, batch, 1))
            runs[name] = lambda m=made, t=start: mbx.generate(m, t, new).tokens
    base = next(iter(ways))
    found = {
        what: beside(runs[base], runs, repeats=3)
        for what, runs in [("prefill", prefills), *((str(b), r) for b, r in decodings.items())]
    }
    return [
        [
            name,
            sizes[name] / 1e6,
            new / found["1"][name][0],
            1 / found["1"][name][1],
            8 * new / found["8"][name][0],
            1 / found["8"][name][1],
            tokens / found["prefill"][name][0],
            1 / found["prefill"][name][1],
            memory[name],
        ]
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path, default=mbx.SHIPPED, help="folder of the model")
    parser.add_argument("--text", type=Path, default=CORPUS, help="text whose end is held out")
    parser.add_argument("--part", choices=("errors", "bytes", "speed"), help="one table only")
    args = arguments(__doc__, parent=parser)
    print_facts("Weights of 8 and 4 bits", quick=args.quick)
    groups = (32, 64, 128)
    if args.part in (None, "errors"):
        size = 128 if args.quick else 1536
        rows = [(bits, g, *errors(bits, g, size)) for bits in BITS for g in groups]
        header = ("bits", "group", "error of the weights", "mean error", "maximum error")
        print_table(header, rows)
    if args.part in (None, "bytes"):
        text = held_out(args.text)[: 2000 if args.quick else 2**15]
        model = mbx.from_pretrained(args.model, dtype=jnp.float32)
        rows, base = [], 0.0
        for name, way in variants(groups).items():
            made = way(model)
            found = bits_per_byte(made, text)
            base = base or found
            rows.append((name, parameter_bytes(made) / 1e6, f"{found:.4f}", f"{found - base:+.4f}"))
            print(f"{name}: {found:.4f}", file=sys.stderr)
        print(f"{args.model.name}, {len(text):,} bytes.\n")
        print_table(("weights", "MB", "bits per byte", "beyond float32"), rows)
    if args.part in (None, "speed"):
        model = tiny_model("mamba1") if args.quick else model_130m("mamba1")
        # What bfloat16 gives is in the tables of the other benchmarks.
        ways = {name: way for name, way in variants((64,)).items() if name != "bfloat16"}
        rows = speeds(model, ways, *((16, 4) if args.quick else (512, 16)))
        header = (
            "weights",
            "MB",
            "decoding, tokens/s",
            "times float32",
            "batch 8, tokens/s",
            "times float32",
            "prefill, tokens/s",
            "times float32",
            "temporary memory of prefill, MiB",
        )
        print_table(header, rows)


if __name__ == "__main__":
    main()
