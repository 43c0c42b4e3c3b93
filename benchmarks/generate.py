"""Measures the cost of `generate` beyond the model, and the speed of speculative decoding.

    python benchmarks/generate.py [--quick] [--no-peers]

The cost includes sampling, penalties, stop strings and streaming. The model has random float32
weights in mamba-130m's shape. `decode.py` compares the bare loop with other libraries.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import (
    Competitors,
    Run,
    arguments,
    beside,
    model_130m,
    once,
    print_facts,
    print_table,
    print_verdict,
    random_tokens,
    tiny_model,
)
from _peers import available, transformers_model
from jaxtyping import PyTree

import mamba_eqx as mbx


class Numbers:
    """A tokenizer for any vocabulary, in which each token is a number written as a word."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def decoder(self, *, prompt: Sequence[int] = ()) -> mbx.text.Decoder:
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        return f" {token}".encode()


Carry = tuple[jax.Array, PyTree]
"""A token, and the states of the layers before it."""

SAMPLING = mbx.Sampling(temperature=0.8)
Draft = mbx.LanguageModel | mbx.generation.PromptLookup
KEY = jr.key(0)
# With random weights, all tokens are about equally likely at a temperature of 0.8, so filters by
# probability keep most of them. At 0.2 the distribution is peaked. Trained models are in between.
PEAKED = mbx.Sampling(temperature=0.2)
AGAIN = "the bare loop again"  # shows the noise of the machine
PENALTIES = mbx.sampling.Penalties(repetition=1.1, presence=0.1, frequency=0.1)


def options(model: mbx.LanguageModel) -> dict[str, mbx.Sampling]:
    """Returns the sampling options to measure, by name."""
    # The stop strings never occur, so all rows have the same length.
    stops = mbx.Sampling(stop_strings=["the end", "###"], tokenizer=Numbers(model.vocab_size))
    everything = replace(stops, temperature=0.2, top_k=40, top_p=0.95, penalties=PENALTIES)
    return {
        "temperature": PEAKED,
        "top-k": replace(PEAKED, top_k=40),
        "top-p": replace(PEAKED, top_p=0.95),
        "top-p, all about equally likely": replace(SAMPLING, top_p=0.95),
        "min-p": replace(PEAKED, min_p=0.05),
        "typical": replace(PEAKED, typical_p=0.9),
        "typical, all about equally likely": replace(SAMPLING, typical_p=0.9),
        "penalties": mbx.Sampling(penalties=PENALTIES),
        "stop strings": stops,
        "top-k, top-p, penalties, stop strings": everything,
    }


def bare(model: mbx.LanguageModel, start: mbx.DecodingState, new: int) -> Run:
    """Returns a compiled loop that only makes steps and takes the most likely token."""

    @functools.partial(jax.jit, static_argnums=2)
    def loop(model: mbx.LanguageModel, start: mbx.DecodingState, new: int) -> jax.Array:
        def body(carry: Carry, _: None) -> tuple[Carry, jax.Array]:
            token, layers = carry
            step = model.step if token.ndim == 0 else jax.vmap(model.step)
            logits, layers = step(token, layers)
            token = jnp.argmax(logits[..., : model.vocab_size], axis=-1).astype(jnp.int32)
            return (token, layers), token

        return jax.lax.scan(body, (start.token, start.layers), length=new)[1]

    return lambda: loop(model, start, new)


def overheads(model: mbx.LanguageModel, new: int, repeats: int) -> None:
    """Measures the options of `generate`, starting from a state, so that no prompt is read."""
    worst = 0.0
    for batch in (1, 8):
        prompts = np.array(random_tokens(model, batch, 4))
        start = mbx.prefill(model, prompts if batch > 1 else prompts[0])
        runs: Competitors = {}

        def run(sampling: mbx.Sampling, start: mbx.DecodingState = start) -> jax.Array:
            return mbx.generate(model, None, new, sampling, state=start, key=KEY).tokens

        runs[AGAIN] = bare(model, start, new)
        runs["generate, greedy"] = functools.partial(run, mbx.Sampling())
        for name, chosen in options(model).items():
            runs[f"generate, {name}"] = functools.partial(run, chosen)
        if batch == 1:
            stream = lambda start=start: list(mbx.stream(model, None, new, state=start))
            runs["stream, greedy"] = stream
        rows = []
        found = beside(bare(model, start, new), runs, repeats=repeats)
        for name, (seconds, ratio) in found.items():
            if name != AGAIN:
                worst = max(worst, ratio - 1)
            rows.append((batch, name, 1e3 * seconds / new, f"{ratio - 1:+.1%}"))
        print_table(("batch", "", "ms per token", "above the bare loop"), rows)
    print_verdict(
        "the largest cost of options, relative to the time per token", worst, 0.05, at_most=True
    )
    print()


def choices(model: mbx.LanguageModel, repeats: int) -> None:
    """Measures only the head and the choice of a token, for eight rows.

    The noise of a whole step would exceed the cost of a choice.
    """
    features = jr.normal(jr.key(0), (8, model.d_model))
    keys = jr.split(jr.key(1), len(features))

    def compiled(choose: Callable[[jax.Array, jax.Array], jax.Array]) -> Run:
        def row(model: mbx.LanguageModel, features: jax.Array, key: jax.Array) -> jax.Array:
            return choose(model.logits(features)[: model.vocab_size], key)

        run = jax.jit(jax.vmap(row, (None, 0, 0)))
        return lambda: run(model, features, keys)

    filters = {
        "temperature": {},
        "top-k": {"top_k": 40},
        "top-p": {"top_p": 0.95},
        "typical": {"typical_p": 0.9},
        "top-k, top-p": {"top_k": 40, "top_p": 0.95},
        "top-k, top-p, typical": {"top_k": 40, "top_p": 0.95, "typical_p": 0.9},
    }
    greedy = compiled(lambda logits, _: mbx.sampling.greedy(logits))
    runs: Competitors = {"greedy again": greedy}
    for temperature, how in ((0.2, ""), (8.0, ", all about equally likely")):
        for name, chosen in filters.items():
            choose = functools.partial(mbx.sampling.sample, temperature=temperature, **chosen)
            runs[name + how] = compiled(choose)
    rows = [
        (name, 1e3 * seconds, 1e3 * seconds * (1 - 1 / ratio))
        for name, (seconds, ratio) in beside(greedy, runs, repeats=repeats).items()
    ]
    print("The head and the choice of a token, eight rows:\n")
    print_table(("", "ms per token", "ms above greedy"), rows)


def draft_of(model: mbx.LanguageModel, layers: int) -> mbx.LanguageModel:
    """Returns a draft model with the first layers of the model.

    With random weights, the model rejects almost all proposals of this draft.
    """
    blocks = model.layers.unstack()[:layers]
    return mbx.LanguageModel(
        mbx.Unrolled(blocks),
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        key=jr.key(0),
    )


def speculation(
    model: mbx.LanguageModel, new: int, repeats: int, lookaheads: tuple[int, ...]
) -> None:
    """Measures the two extremes: drafts that are always accepted, and drafts that never are.

    Between them, the speed-up grows with the number of accepted tokens.
    """
    first = np.array(random_tokens(model, 32))
    # Greedy decoding of a model with random weights ends in a cycle. Prompt lookup predicts a cycle
    # perfectly, and never predicts a sampled text.
    cycle = np.concatenate([first, mbx.generate(model, first, 16 if new < 32 else 256).tokens])
    cases: dict[str, tuple[Draft, np.ndarray, mbx.Sampling]] = {
        "itself, greedy": (model, first, mbx.Sampling()),
        "itself, sampling": (model, first, SAMPLING),
        "its first 2 layers, greedy": (draft_of(model, 2), first, mbx.Sampling()),
        "its first 2 layers, sampling": (draft_of(model, 2), first, SAMPLING),
        "prompt lookup, greedy": (mbx.generation.PromptLookup(), first, mbx.Sampling()),
        "prompt lookup, greedy, later": (mbx.generation.PromptLookup(), cycle, mbx.Sampling()),
        "prompt lookup, sampling": (
            mbx.generation.PromptLookup(),
            first,
            mbx.Sampling(temperature=2.0),
        ),
    }
    rows = []
    for name, (draft, prompt, sampling) in cases.items():
        plain = functools.partial(mbx.generate, model, prompt, new, sampling, key=KEY)
        for lookahead in lookaheads:
            fast = functools.partial(
                mbx.speculate, model, draft, prompt, new, sampling, lookahead=lookahead, key=KEY
            )
            seconds, ratio = beside(plain, {"": fast}, repeats=repeats)[""]
            out = fast()
            accepted = int(out.accepted) / int(out.proposed)
            rows.append((name, lookahead, f"{accepted:.0%}", 1e3 * seconds / new, 1 / ratio))
    header = ("draft", "lookahead", "accepted", "ms per token", "times the speed of `generate`")
    print_table(header, rows)


def peer(model: mbx.LanguageModel, new: int) -> None:
    """Compares sampling with transformers, where some filters cost more than the model."""
    import torch

    theirs = transformers_model(model)
    penalties = mbx.sampling.Penalties(repetition=1.1)
    sampling = replace(SAMPLING, top_k=40, top_p=0.95, penalties=penalties)
    rows = []
    for batch in (1, 8):
        prompts = np.array(random_tokens(model, batch, 4))
        tokens = torch.from_numpy(prompts.astype(np.int64))

        def run(tokens: torch.Tensor = tokens) -> torch.Tensor:
            with torch.inference_mode():
                return theirs.generate(
                    tokens,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    temperature=0.8,
                    top_k=40,
                    top_p=0.95,
                    repetition_penalty=1.1,
                    eos_token_id=None,
                    pad_token_id=0,
                )

        ours = functools.partial(
            mbx.generate,
            model,
            prompts if batch > 1 else prompts[0],
            new,
            sampling,
            key=KEY,
        )
        jax.block_until_ready(ours())
        mine = np.median([once(ours) for _ in range(5)])
        other = np.median([once(run) for _ in range(3)])
        rows.append((batch, batch * new / mine, batch * new / other, other / mine))
    print("Sampling with temperature, top-k, top-p and a penalty on repetition, from 4 tokens:\n")
    print_table(("batch", "tokens/s", "tokens/s of transformers", "faster by"), rows)


def main() -> None:
    args = arguments(__doc__)
    print_facts("Generation", quick=args.quick)
    model = tiny_model("mamba1") if args.quick else model_130m("mamba1")
    new, repeats = (16, 3) if args.quick else (32, 7)
    overheads(model, new, repeats)
    choices(model, 10 * repeats)
    speculation(model, new, repeats, (3,) if args.quick else (2, 4, 8))
    if not args.no_peers and available("torch") and available("transformers"):
        peer(model, 8 if args.quick else 16)


if __name__ == "__main__":
    main()
