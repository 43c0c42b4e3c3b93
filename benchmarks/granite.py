"""Prefill and greedy decoding with random float32 weights in the shape of Granite-4.0-H-350M.

    python benchmarks/granite.py [--tokens 512] [--quick] [--no-peers]

The model is a hybrid: 28 layers of Mamba-2 and 4 of attention, each with a gated MLP.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import (
    Competitors,
    Run,
    arguments,
    compiled,
    medians,
    parameter_bytes,
    print_facts,
    print_table,
    print_verdict,
    random_tokens,
)
from _peers import available, check_agrees, transformers_model

import mamba_eqx as mbx


ATTENTION_LAYERS = (10, 13, 17, 27)
Prefill = Callable[[np.ndarray, bool], Run]
"""Returns a prefill of the tokens, with all logits or the last ones only."""


def granite(*, quick: bool) -> mbx.LanguageModel:
    """Builds the model, or with `quick` a small one of the same kind."""
    d_model, d_intermediate, nheads, nheads_kv = (64, 96, 2, 1) if quick else (768, 2048, 12, 4)
    mamba = mbx.Mamba2Config(d_model, headdim=32, d_state=16 if quick else 128)
    attention = mbx.AttentionConfig(
        d_model, nheads=nheads, nheads_kv=nheads_kv, softmax_scale=0.015625
    )
    mlp = mbx.GatedMLPConfig(d_intermediate)
    blocks = [
        mbx.BlockConfig(mixer, mlp=mlp, residual_multiplier=0.246) for mixer in (mamba, attention)
    ]
    layers = [blocks[i in ATTENTION_LAYERS] for i in range(12 if quick else 32)]
    config = mbx.LanguageModelConfig(
        256 if quick else 100352,
        tuple(layers),
        embedding_multiplier=12.0,
        logits_multiplier=1 / 3,
        residual_in_fp32=False,
    )
    return config.build(key=jr.key(0))


def our_prefill(model: mbx.LanguageModel) -> Prefill:
    """Returns a function that compiles a prefill."""

    def last(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
        return model.logits(model.backbone(tokens)[0][-1])

    def everything(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
        return model(tokens)

    return lambda tokens, all_logits: compiled(
        everything if all_logits else last, model, jnp.asarray(tokens, jnp.int32)
    )[0]


def their_prefill(model: Any) -> Prefill:
    """Returns the same for a model of transformers."""
    import torch

    def prefill(tokens: np.ndarray, all_logits: bool) -> Run:
        def run() -> np.ndarray:
            with torch.inference_mode():
                out = model(
                    torch.from_numpy(tokens[None]),
                    use_cache=False,
                    logits_to_keep=0 if all_logits else 1,
                )
                return out.logits[0].numpy()

        return run

    return prefill


def their_decoding(model: Any, new: int) -> Run:
    """Returns a call that decodes greedily in transformers, after a prompt of one token."""
    import torch

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(
                torch.ones((1, 1), dtype=torch.int64),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )[0, 1:].numpy()

    return run


def main() -> None:
    args = arguments(__doc__, tokens=[512])
    quick = args.quick
    bandwidth, _ = print_facts("Granite-4.0-H-350M", quick=quick)
    model = granite(quick=quick)
    theirs = None
    if not args.no_peers and available("torch") and available("transformers"):
        theirs = transformers_model(model)
    prefills = {"mamba_eqx": our_prefill(model)}
    if theirs is not None:
        prefills["transformers"] = their_prefill(theirs)

    rows, verdicts = [], []
    for seq in [16] if quick else args.tokens:
        tokens = np.array(random_tokens(model, seq), np.int64)
        for all_logits in (False, True):
            runs: Competitors = {
                name: prefill(tokens, all_logits) for name, prefill in prefills.items()
            }
            if theirs is not None:
                last = runs["mamba_eqx"]()
                check_agrees("transformers", runs["transformers"]()[-1], np.atleast_2d(last)[-1])
            seconds = medians(runs, repeats=5)
            ratio = None if theirs is None else seconds["transformers"] / seconds["mamba_eqx"]
            what = f"prefill of {seq} tokens, {'all' if all_logits else 'last'} logits"
            rates = (seq / value for value in seconds.values())
            rows.append((what, *rates, *(() if ratio is None else (ratio,))))
            verdicts.append((what, ratio, 3))

    new, new_theirs = (8, 8) if quick else (64, 16)
    prompt = np.ones(1, np.int32)

    def generate() -> jax.Array:
        return mbx.generate(model, prompt, new).tokens

    seconds = medians({"mamba_eqx": generate}, repeats=5)
    rate, ratio = new / seconds["mamba_eqx"], None
    row: list[object] = [f"decoding, {new} tokens", rate]
    if theirs is not None:
        run = their_decoding(theirs, new_theirs)
        same = np.array_equal(run(), np.ravel(generate())[:new_theirs])
        rate_theirs = new_theirs / medians({"": run}, repeats=3)[""]
        ratio = rate / rate_theirs
        row += [rate_theirs, ratio]
        print(f"The first {new_theirs} tokens are {'equal' if same else 'DIFFERENT'}.\n")
    rows.append(tuple(row))
    verdicts.append(("decoding", ratio, 1.3))
    share = rate * parameter_bytes(model) / bandwidth

    print("Tokens per second, and the ratio of ours to theirs:\n")
    print_table(("", *prefills, *(() if theirs is None else ("ratio",))), rows)
    print(f"Decoding reads weights at {share:.0%} of the bandwidth.\n")
    if not quick:
        for what, ratio, wanted in verdicts:
            print_verdict(f"times the speed of transformers, {what}", ratio, wanted)


if __name__ == "__main__":
    main()
