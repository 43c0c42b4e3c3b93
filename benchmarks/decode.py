"""Greedy decoding in tokens per second, with random float32 weights in mamba-130m's shape.

    python benchmarks/decode.py [--mixer mamba2] [--quick] [--no-peers]

Every token reads all weights once, so memory bandwidth is the limit at batch 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _common import (
    Competitors,
    Run,
    arguments,
    medians,
    model_130m,
    parameter_bytes,
    print_facts,
    print_table,
    print_verdict,
    random_tokens,
    tiny_model,
)
from _llama import Llama, has_llama
from _peers import available, has, mambapy_model, transformers_model
from jaxtyping import PyTree

import mamba_eqx as mbx


def generate(model: mbx.LanguageModel, prompts: np.ndarray, new: int) -> Run:
    """Returns a call of `generate`. Prompts have one token, so only steps are measured."""

    def run() -> jax.Array:
        return mbx.generate(model, prompts if len(prompts) > 1 else prompts[0], new).tokens

    return run


def steps(model: mbx.LanguageModel, prompts: np.ndarray, new: int) -> Run:
    """Returns a Python loop around a compiled step."""

    @jax.jit
    def step(model: mbx.LanguageModel, token: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        logits, state = jax.vmap(model.step)(token, state)
        return jnp.argmax(logits[:, : model.vocab_size], axis=-1).astype(jnp.int32), state

    batch = len(prompts)
    empty = jax.tree.map(lambda t: jnp.broadcast_to(t, (batch, *t.shape)), model.init_state())

    def run() -> jax.Array:
        token, state, tokens = jnp.asarray(prompts[:, 0], jnp.int32), empty, []
        for _ in range(new):
            token, state = step(model, token, state)
            tokens.append(token)
        return jnp.stack(tokens, axis=1)

    return run


def torch_peers(model: mbx.LanguageModel, mixer: str, prompts: np.ndarray, new: int) -> Competitors:
    """Returns calls that decode greedily in other libraries on PyTorch."""
    import torch

    start = torch.from_numpy(prompts.astype(np.int64))
    peers: Competitors = {}
    if has("transformers", mixer):
        transformers = transformers_model(model)

        def run_transformers() -> np.ndarray:
            with torch.inference_mode():
                return transformers.generate(
                    start,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=None,
                    pad_token_id=0,
                )[:, 1:].numpy()

        peers["transformers"] = run_transformers
    if has("mambapy", mixer):
        mambapy = mambapy_model(model)

        def run_mambapy() -> np.ndarray:
            token, caches, tokens = start[:, 0], mambapy.empty(len(prompts)), []
            with torch.inference_mode():
                for _ in range(new):
                    logits, caches = mambapy.step(token, caches)
                    token = logits[:, : model.vocab_size].argmax(dim=-1)
                    tokens.append(token)
            return torch.stack(tokens, dim=1).numpy()

        peers["mamba.py"] = run_mambapy
    return peers


def llama_peer(llama: Llama, model: mbx.LanguageModel, prompts: np.ndarray, new: int) -> Run:
    """Returns a call that decodes greedily in llama.cpp."""

    def run() -> np.ndarray:
        llama.forget()
        token, tokens = prompts[:, 0], []
        for position in range(new):
            token = llama.step(token, position)[:, : model.vocab_size].argmax(axis=-1)
            tokens.append(token)
        return np.stack(tokens, axis=1)

    return run


def main() -> None:
    args = arguments(__doc__, mixers=True)
    quick, with_peers, mixer = args.quick, not args.no_peers, args.mixer
    bandwidth, _ = print_facts(f"Decoding, {mixer}", quick=quick)
    make = partial(tiny_model if quick else model_130m, mixer)
    new, new_peers = (8, 4) if quick else (64, 16)
    models = {"unrolled": make(), "stacked": make(stacked=True)}
    weights = parameter_bytes(models["unrolled"])

    rows, speed = [], {}
    for batch in (1, 8):
        prompts = np.array(random_tokens(models["unrolled"], batch, 1))
        runs: Competitors = {}
        for name, model in models.items():
            runs[f"{name}, generate"] = generate(model, prompts, new)
            runs[f"{name}, loop over step"] = steps(model, prompts, new)
        counts = dict.fromkeys(runs, new)
        llama = None
        if with_peers and has_llama() and has("llama_cpp", mixer):
            llama = Llama(models["unrolled"], seq=new, batch=batch)
            runs["llama.cpp"] = llama_peer(llama, models["unrolled"], prompts, new)
            counts["llama.cpp"] = new
        seconds = medians(runs, repeats=7)
        if with_peers and available("torch"):
            # The peers on PyTorch are at least ten times slower, so they generate fewer tokens.
            found = torch_peers(models["unrolled"], mixer, prompts, new_peers)
            runs |= found
            counts |= dict.fromkeys(found, new_peers)
            seconds |= medians(found, repeats=3)
        expected = np.reshape(runs["unrolled, generate"](), (batch, -1))
        for name, run in runs.items():
            tokens = np.reshape(run(), (batch, -1))
            same = np.mean(tokens == expected[:, : tokens.shape[1]])
            rate = batch * counts[name] / seconds[name]
            speed[name, batch] = rate
            share = rate / batch * weights / bandwidth
            ratio = speed["unrolled, generate", batch] / rate
            rows.append((batch, name, rate, ratio, share, f"{same:.0%}"))
        if llama is not None:
            llama.close()
    print(f"{weights / 1e6:.0f} MB of weights; {new} tokens ({new_peers} in PyTorch).\n")
    print_table(
        (
            "batch",
            "",
            "tokens/s",
            "`generate` unrolled is faster by",
            "share of the bandwidth",
            "same tokens",
        ),
        rows,
    )
    theirs = speed.get(("llama.cpp", 1))
    ratio = None if theirs is None else speed["unrolled, generate", 1] / theirs
    if not quick and mixer == "mamba1":
        print_verdict("times the speed of llama.cpp in float32 at batch 1", ratio, 1)


if __name__ == "__main__":
    main()
