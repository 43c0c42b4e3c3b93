"""Times a mixture of experts beside the matrix products that its chosen experts need.

    python benchmarks/mixture.py [--quick] [--no-peers]

The sizes are Granite-4.0-H-Tiny's (d_model 1536, 64 experts of width 512, 6 for each token), in
float32 unless the name of a row says bfloat16. "both" is a forward and a backward pass, with
gradients of the parameters and of the input.

Two kinds of products are as many operations as those of the experts, but without routing:

- "large products" are of all tokens with one expert, 6 times, or of one token with 6 experts. The
  weight stays in the cache, and its gradient is that of one expert. They are a bound, which no
  mixture reaches.
- "products of experts" are of every expert, an array of its own, with the tokens that chose it,
  already sorted. All weights are read, and all of their gradients written, as a mixture has to.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import Competitors, Pair, arguments, compiled, cores, medians, print_facts, print_table
from _peers import available, check_agrees
from jaxtyping import PyTree

import mamba_eqx as mbx


def pair(function: Callable[..., jax.Array], *args: PyTree) -> Pair:
    """Compiles a function, and its value and gradients with respect to all arguments."""

    def both(*args: PyTree) -> PyTree:
        return jax.value_and_grad(lambda args: jnp.sum(jnp.sin(function(*args))))(args)

    return compiled(function, *args)[0], compiled(both, *args)[0]


def expert(x: jax.Array, fc1: jax.Array, fc2: jax.Array) -> jax.Array:
    """Applies one expert to its tokens."""
    a, g = jnp.split(x @ fc1.T, 2, axis=-1)
    return (a * jax.nn.silu(g)) @ fc2.T


def products_of_experts(mixture: mbx.MixtureOfExperts, x: jax.Array) -> Pair:
    """Returns the products of every chosen expert with its tokens."""
    chosen = np.asarray(mixture.router(x).experts)
    experts = [
        (x[np.any(chosen == e, axis=1)], mixture.fc1[e], mixture.fc2[e]) for e in np.unique(chosen)
    ]
    run = lambda *experts: jnp.concatenate([expert(*arrays) for arrays in experts])
    return pair(run, *experts)


def large_products(mixture: mbx.MixtureOfExperts, x: jax.Array) -> Pair:
    """Returns as many operations in as few products as possible."""
    top_k, width = mixture.router.top_k, mixture.d_intermediate
    if len(x) > 1:
        return pair(expert, jnp.repeat(x, top_k, axis=0), mixture.fc1[0], mixture.fc2[0])
    fc1 = jnp.concatenate(list(mixture.fc1[:top_k]))
    fc2 = jnp.concatenate(list(mixture.fc2[:top_k]), axis=1)

    def run(x: jax.Array, fc1: jax.Array, fc2: jax.Array) -> jax.Array:
        hidden = (x @ fc1.T).reshape(len(x), -1, 2, width)
        return (hidden[:, :, 0] * jax.nn.silu(hidden[:, :, 1])).reshape(len(x), -1) @ fc2.T

    return pair(run, x, fc1, fc2)


def transformers_layer(mixture: mbx.MixtureOfExperts) -> Any:
    """Returns `GraniteMoeHybridMoE` with the same weights."""
    import torch
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

    torch.set_num_threads(cores())
    config = GraniteMoeHybridConfig(
        hidden_size=mixture.d_model,
        mamba_n_heads=2,
        intermediate_size=mixture.d_intermediate,
        num_local_experts=mixture.router.n_experts,
        num_experts_per_tok=mixture.router.top_k,
    )
    layer = granite.GraniteMoeHybridMoE(config)
    value, gate = jnp.split(mixture.fc1, 2, axis=1)
    weights = {
        "router.weight": mixture.router.weight,
        "experts.gate_up_proj": jnp.concatenate([gate, value], axis=1),
        "experts.down_proj": mixture.fc2,
    }
    tensors = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_()


def peer(layer: Any, implementation: str, x: jax.Array) -> Pair:
    """Returns the calls of a layer of transformers with one implementation of the experts."""
    import torch

    inputs = torch.from_numpy(np.array(x)[None]).to(layer.router.weight.dtype).requires_grad_()

    def forward() -> Any:
        layer.experts.config._experts_implementation = implementation
        with torch.inference_mode():
            return layer(inputs)[0].float().numpy()

    def both() -> Any:
        layer.experts.config._experts_implementation = implementation
        layer.zero_grad(set_to_none=True)
        torch.sum(torch.sin(layer(inputs))).backward()
        return layer.router.weight.grad.float().numpy()

    return forward, both


def main() -> None:
    args = arguments(__doc__)
    quick = args.quick
    print_facts("Mixture of experts", quick=quick)
    d_model, width, n_experts, top_k, seq = (16, 8, 4, 2, 8) if quick else (1536, 512, 64, 6, 512)
    mixture = mbx.MixtureOfExperts(d_model, width, n_experts=n_experts, top_k=top_k, key=jr.key(0))
    narrow = mbx.cast(mixture, jnp.bfloat16)
    theirs = theirs_narrow = None
    if not args.no_peers and available("torch") and available("transformers"):
        theirs = transformers_layer(mixture)
        theirs_narrow = copy.deepcopy(theirs).bfloat16()
    # Sums over the outputs of "both" are in float32.
    run = lambda mixture, x: mixture(x).astype(jnp.float32)
    rows = []
    for tokens in (seq, 1):
        x = jr.normal(jr.key(1), (tokens, d_model))
        pairs = {
            "mamba_eqx": pair(run, mixture, x),
            "mamba_eqx, bfloat16": pair(run, narrow, x.astype(jnp.bfloat16)),
            "products of experts": products_of_experts(mixture, x),
            "large products": large_products(mixture, x),
        }
        if theirs is not None:
            peers = {
                "transformers, grouped_mm": peer(theirs, "grouped_mm", x),
                "transformers, eager": peer(theirs, "eager", x),
                "transformers, grouped_mm, bfloat16": peer(theirs_narrow, "grouped_mm", x),
            }
            for name, (forward, _) in peers.items():
                bound = 0.1 if "bfloat16" in name else 1e-3
                check_agrees(name, forward(), pairs["mamba_eqx"][0](), bound)
            pairs |= peers
        times = []
        for i in range(2):
            runs: Competitors = {name: calls[i] for name, calls in pairs.items()}
            times.append(medians(runs))
        for name in pairs:
            seconds = [found[name] for found in times]
            ratios = [
                found[name] / found[base]
                for base in ("products of experts", "large products")
                for found in times
            ]
            rows.append((tokens, name, *(1e3 * s for s in seconds), *ratios))
    print("Milliseconds:\n")
    names = ("forward", "both")
    ratios = (f"{name} / {base}" for base in ("experts'", "large") for name in names)
    print_table(("tokens", "", *names, *ratios), rows)


if __name__ == "__main__":
    main()
