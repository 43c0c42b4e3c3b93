"""Prints the tables of docs/parity.md: the differences from other implementations.

    python -m tests.parity.table

The second table needs torch and transformers, which the `parity` extra installs.
"""

import importlib.util
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import mamba_eqx as mbx
from tests.support import parity
from tests.support.checkpoints import make
from tests.support.parity_models import OURS, THEIRS


def errors(pairs):
    """Returns the largest absolute error, and the largest error relative to its array."""
    worst = np.zeros(2)
    for got, want in pairs:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.max(np.abs(got - want))
        worst = np.maximum(worst, [error, error / np.max(np.abs(want))])
    return worst


def state_pairs(i, state, golden):
    """Returns pairs of the arrays of a state and those of a golden file."""
    pairs = [(array, golden[name]) for name, array in parity.named_state(i, state, golden).items()]
    # Nothing that follows uses the oldest input of a convolution.
    return [(a, b if a.shape == b.shape else b[:, 1:]) for a, b in pairs]


def golden_rows():
    for case, layout in parity.GOLDEN_LAYOUTS.items():
        folder = parity.GOLDEN / case
        golden = load_file(folder / "golden.safetensors")
        for dtype in (jnp.float64, jnp.float32):
            with jax.enable_x64(dtype == jnp.float64):
                model = mbx.from_pretrained(folder, dtype=dtype)
                tokens = jnp.asarray(golden["tokens"])
                _, logits, states, hidden, grads = parity.run(model, tokens)
                named = mbx.state_dict(grads, layout=layout)
                # Here, since outside JAX would round the scaled states to float32.
                layers = list(enumerate(states))
                groups = {
                    "logits": [(logits, golden["logits"])],
                    "hidden states": [(hidden[i], golden[f"hidden_states.{i}"]) for i, _ in layers]
                    + [(hidden[-1], golden["hidden_states.norm_f"])],
                    "final states": [pair for i, s in layers for pair in state_pairs(i, s, golden)],
                    "gradients": [(grad, golden[f"grad.{name}"]) for name, grad in named.items()],
                }
            for what, pairs in groups.items():
                yield f"`{case}`", jnp.dtype(dtype).name, what, len(pairs), *errors(pairs)


def live_rows():
    import torch

    def compare(model, theirs, step):
        tokens = np.arange(25) * step % 13
        logits = eqx.filter_jit(model)(jnp.asarray(tokens))
        return errors([(logits, parity.their_logits(torch, theirs, tokens))])

    for name, config in OURS["mamba"].items():
        model = jax.tree.map(lambda leaf: 0.5 * leaf, make(config))
        with tempfile.TemporaryDirectory() as folder:
            mbx.save_pretrained(model, folder)
            yield (
                f"`{name}`",
                "transformers loads ours",
                *compare(model, parity.load_theirs(folder), 7),
            )
    for name, fields in THEIRS["mamba"].items():
        theirs = parity.their_model(torch, fields)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            model = mbx.from_pretrained(folder)
        yield f"`{name}`", "we load transformers'", *compare(model, theirs, 11)


def print_table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        cells = (f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def main():
    header = ("case", "precision", "what", "arrays", "absolute", "relative")
    print_table(header, golden_rows())
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        print_table(("model", "", "logits, absolute", "logits, relative"), live_rows())


if __name__ == "__main__":
    main()
