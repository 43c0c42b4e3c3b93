"""Prints the table of sizes in docs/pretrained.md, computed from published configs.

python -m tests.pretrained.table
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import mamba_eqx as mbx
from mamba_eqx.pretrained.layouts import LAYOUTS, skeleton
from tests.support.published_falcon_h1 import FALCON_H1
from tests.support.published_hybrids import HYBRIDS


HEAD = (
    "| model | parameters | weights in bfloat16 | state after 4,096 tokens | after 1,048,576 |\n"
    "|---|---|---|---|---|"
)


def rows() -> list[str]:
    """Returns the rows of the table."""
    return [row(name, values) for name, (values, _) in {**HYBRIDS, **FALCON_H1}.items()]


def row(name: str, values: dict) -> str:
    """Returns the row of one model, given its published config."""
    shapes = skeleton(LAYOUTS["transformers"].read_config(values))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    model = jax.eval_shape(lambda model: mbx.cast(model, jnp.bfloat16), shapes)
    sizes = [size(model), *(size(state(model, length)) for length in (2**12, 2**20))]
    return f"| `{name}` | {parameters:,} | {' | '.join(map(gigabytes, sizes))} |"


def state(model: mbx.LanguageModel, length: int) -> PyTree:
    """Returns the shapes of the state of one sequence of a length."""
    return jax.eval_shape(lambda model: model.init_state(max_len=length), model)


def size(tree: PyTree) -> int:
    """Returns the number of bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gigabytes(count: int) -> str:
    """Formats a number of bytes with three digits."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


if __name__ == "__main__":
    print(HEAD, *rows(), sep="\n")
