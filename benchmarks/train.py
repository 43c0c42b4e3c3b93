"""Measures training steps, forward and backward (d_model 256, 8 layers), in tokens per second.

    python benchmarks/train.py [--mixer mamba2] [--quick] [--no-peers]

The loss is the mean cross-entropy of the next token. The update by the optimiser, which is the same
for all competitors, is excluded.

The share of the limit counts matrix products only: the operations of the model's products with its
weights, divided by the operations that the machine could do in the same time. The other work of a
step, such as scans and the recomputation by `remat`, takes time but is not counted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _common import (
    Competitors,
    Run,
    arguments,
    compiled,
    medians,
    print_facts,
    print_table,
    print_verdict,
    random_tokens,
    small_model,
    temporary_mib,
    tiny_model,
)
from _peers import available, check_agrees, has, mambapy_model, transformers_model

import mamba_eqx as mbx


def loss(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next token, for one sequence or a batch."""
    # `vmap` over one sequence is slower than the sequence alone.
    logits = model(tokens) if tokens.ndim == 1 else jax.vmap(model)(tokens)
    log_probs = jax.nn.log_softmax(logits[..., :-1, :])
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[..., 1:, None], axis=-1))


def operations(model: mbx.LanguageModel) -> int:
    """Returns the operations per token of all products with weights.

    Each weight takes a multiplication and an addition in the forward pass, and as many each for the
    gradients of inputs and weights.
    """

    def is_linear(node: object) -> bool:
        return isinstance(node, mbx.layers.Linear)

    linears = filter(is_linear, jax.tree.leaves(model, is_leaf=is_linear))
    weights = sum(linear.weight.size for linear in linears)
    if model.lm_head is None:
        weights += model.embedding.weight.size
    return 3 * 2 * weights


def torch_peers(model: mbx.LanguageModel, mixer: str, tokens: jax.Array) -> Competitors:
    """Returns, by name, calls that return the loss and leave the gradients in the peer."""
    import torch

    numbers = torch.from_numpy(np.array(tokens, np.int64))

    def step(peer: Any, logits: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        def run() -> torch.Tensor:
            peer.zero_grad(set_to_none=True)
            value = torch.nn.functional.cross_entropy(
                logits(numbers)[:, :-1].flatten(0, 1), numbers[:, 1:].flatten()
            )
            value.backward()
            return value.detach()

        return run

    peers: Competitors = {}
    # Four sequences would take a minute, and show the same as one.
    if has("transformers", mixer) and len(tokens) == 1:
        transformers = transformers_model(model)
        peers["transformers"] = step(
            transformers, lambda t: transformers(t, use_cache=False).logits
        )
    if has("mambapy", mixer):
        mambapy = mambapy_model(model)
        peers["mamba.py"] = step(mambapy, mambapy)
    return peers


def main() -> None:
    args = arguments(__doc__, mixers=True)
    quick, with_peers = args.quick, not args.no_peers and available("torch")
    make = partial(tiny_model if quick else small_model, args.mixer)
    _, limit = print_facts(f"Training step, {args.mixer}", quick=quick)
    sizes = [(1, 32), (2, 16)] if quick else [(1, 512), (4, 256)]
    models = {
        "unrolled": make(),
        "unrolled, remat": make(remat=True),
        "stacked": make(stacked=True),
        "stacked, remat": make(stacked=True, remat=True),
        "stacked, remat but products": make(
            stacked=True, remat=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        ),
    }
    per_token = operations(models["unrolled"])
    print(f"{per_token / 1e6:.1f} million operations per token in products with weights.\n")
    speed = {}
    for batch, seq in sizes:
        rows = []
        tokens = random_tokens(models["unrolled"], batch, seq)
        calls = {
            name: (model, tokens if batch > 1 else tokens[0]) for name, model in models.items()
        }
        if batch == 1:
            calls["unrolled, `vmap` over one"] = (models["unrolled"], tokens)
        runs: Competitors = {}
        used = {}
        for name, call in calls.items():
            runs[name], executable = compiled(eqx.filter_value_and_grad(loss), *call)
            used[name] = temporary_mib(executable)
        if with_peers:
            found = torch_peers(models["unrolled"], args.mixer, tokens)
            ours = runs["unrolled"]()[0]
            for name, run in found.items():
                check_agrees(f"The loss of {name}", run(), ours)
            # The peers are warm, because they have run once for the comparison.
            seconds = medians(runs) | medians(found, repeats=3, warm=False, budget=10)
        else:
            seconds = medians(runs)
        for name, time in seconds.items():
            speed[name, batch] = batch * seq / time
            ratio = time / seconds["unrolled"]
            share = f"{batch * seq * per_token / time / limit:.0%}"
            rows.append((batch, seq, name, batch * seq / time, share, ratio, used.get(name)))
        header = ("batch", "seq", "", "tokens/s", "of the limit", "unrolled is faster by")
        print_table((*header, "temporary memory, MiB"), rows)
    if quick or args.mixer != "mamba1":
        return
    for name, wanted in (("transformers", 25), ("mamba.py", 2)):
        theirs = speed.get((name, 1))
        ratio = None if theirs is None else speed["unrolled", 1] / theirs
        print_verdict(f"times the speed of {name} at batch 1", ratio, wanted)


if __name__ == "__main__":
    main()
