"""Measures the gradient of LoRA by merging, as in the package, and by wrapping each layer.

    python benchmarks/lora.py [--quick]

Both methods train the same pairs; `all weights` is training without LoRA. The smaller model has the
shape of the bundled one, and the larger one the width of mamba-130m, with four layers and a byte
vocabulary.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import (
    arguments,
    byte_model,
    compiled,
    medians,
    print_facts,
    print_table,
    random_tokens,
    temporary_mib,
    tiny_model,
)
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

import mamba_eqx as mbx
from mamba_eqx.training import LoRA


class Wrapper(mbx.layers.AbstractLinear):
    """A linear layer with a low-rank change, `W x + b (a x)`, which is the usual design of LoRA."""

    inner: mbx.layers.Linear
    a: jax.Array
    b: jax.Array

    def __init__(self, inner: mbx.layers.Linear, a: jax.Array, b: jax.Array):
        self.inner, self.a, self.b = inner, a, b

    @property
    def weight(self) -> jax.Array:
        return self.inner.weight

    @property
    def bias(self) -> jax.Array | None:
        return self.inner.bias

    @property
    def dtype(self) -> jnp.dtype:
        return self.inner.dtype

    def __call__(self, x: jax.Array, *, dtype: DTypeLike | None = None) -> jax.Array:
        return self.inner(x, dtype=dtype) + x @ self.a.T @ self.b.T


def wrapped(model: mbx.LanguageModel, lora: LoRA) -> mbx.LanguageModel:
    """Returns the model with wrappers around the linear layers that the LoRA changes."""

    def wrap(path: KeyPath, node: PyTree) -> PyTree:
        pair = lora.pairs.get(jax.tree_util.keystr(path, simple=True, separator="."))
        return node if pair is None else Wrapper(node, pair.a, lora.scale * pair.b)

    is_linear = lambda node: isinstance(node, mbx.layers.Linear)
    return jax.tree_util.tree_map_with_path(wrap, model, is_leaf=is_linear)


def loss_of(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
    logits = jax.vmap(model)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def wide_model() -> mbx.LanguageModel:
    """Builds a model with the width of mamba-130m, four layers and a byte vocabulary."""
    return mbx.LanguageModelConfig(256, (mbx.BlockConfig(mbx.Mamba1Config(768)),) * 4).build(
        key=jr.key(0)
    )


def main() -> None:
    args = arguments(__doc__)
    print_facts("LoRA, rank 8", quick=args.quick)
    rows = []
    if args.quick:
        sizes = [(tiny_model("mamba1"), 1, 16)]
    else:
        sizes = [(byte_model(), 16, 128), (wide_model(), 4, 512)]
    for model, batch, seq in sizes:
        lora = LoRA.init(model, rank=8, key=jr.key(1))
        lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
        tokens = random_tokens(model, batch, seq + 1)
        ways = {
            "all weights": (lambda m, lora, t: jax.value_and_grad(loss_of)(m, t)),
            "merged": (
                lambda m, lora, t: jax.value_and_grad(lambda p: loss_of(p.merge(m), t))(lora)
            ),
            "wrapped": (
                lambda m, lora, t: jax.value_and_grad(lambda p: loss_of(wrapped(m, p), t))(lora)
            ),
        }
        found = {name: compiled(way, model, lora, tokens) for name, way in ways.items()}
        one, other = (jax.tree.leaves(found[name][0]()[1]) for name in ("merged", "wrapped"))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))
        seconds = medians({name: run for name, (run, _) in found.items()}, repeats=9, budget=60)
        for name, (_, executable) in found.items():
            used = temporary_mib(executable)
            rows.append((model.d_model, batch, seq, name, 1e3 * seconds[name], used))
    print_table(("d_model", "batch", "seq", "", "milliseconds", "temporary memory, MiB"), rows)


if __name__ == "__main__":
    main()
