"""Tags each token of a sequence with a bidirectional encoder, and with a causal one to compare.

    python examples/encoder.py

The tag of a letter tells whether it is the first of its kind in the sequence, the last, both or
neither. A causal model can recognise the first; the last depends on what follows. Batches are
padded on the right, and `length` excludes the padding in both directions.
"""

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from option_types import number

import mamba_eqx as mbx


LETTERS = 8
TAGS = ("neither", "first", "last", "both")


class EncoderBlock(eqx.Module):
    """A residual block whose norm and residual connection enclose both directions."""

    norm: eqx.nn.RMSNorm
    mixer: mbx.Bidirectional | mbx.Mamba1

    def __init__(self, d_model: int, *, bidirectional: bool, key: jax.Array):
        keys = jr.split(key)
        self.norm = eqx.nn.RMSNorm(d_model)
        if bidirectional:
            # Two layers of half the width have as many parameters as the causal one.
            forward, backward = (mbx.Mamba1(d_model, d_inner=d_model, key=k) for k in keys)
            self.mixer = mbx.Bidirectional(forward, backward)
        else:
            self.mixer = mbx.Mamba1(d_model, d_inner=2 * d_model, key=keys[0])

    def __call__(self, x: jax.Array, length: jax.Array) -> jax.Array:
        return x + self.mixer(jax.vmap(self.norm)(x), length=length)


class Tagger(eqx.Module):
    """A model that returns the logits of the tags of each letter."""

    embedding: eqx.nn.Embedding
    blocks: list[EncoderBlock]
    head: eqx.nn.Linear

    def __init__(self, d_model: int, n_layer: int, *, bidirectional: bool, key: jax.Array):
        embedding_key, head_key, *block_keys = jr.split(key, 2 + n_layer)
        self.embedding = eqx.nn.Embedding(LETTERS, d_model, key=embedding_key)
        self.blocks = [
            EncoderBlock(d_model, bidirectional=bidirectional, key=k) for k in block_keys
        ]
        self.head = eqx.nn.Linear(d_model, len(TAGS), key=head_key)

    def __call__(self, letters: jax.Array, length: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(letters)
        for block in self.blocks:
            x = block(x, length)
        return jax.vmap(self.head)(x)


def make_sequences(rng: np.random.Generator, count: int, longest: int) -> tuple[np.ndarray, ...]:
    """Returns padded letters, their lengths and their tags."""
    lengths = rng.integers(longest // 2, longest + 1, size=count)
    letters = rng.integers(LETTERS, size=(count, longest))
    tags = np.zeros((count, longest), np.int32)
    for i, length in enumerate(lengths):
        row = letters[i, :length]
        for letter in range(LETTERS):
            places = np.flatnonzero(row == letter)
            if len(places):
                tags[i, places[0]] += TAGS.index("first")
                tags[i, places[-1]] += TAGS.index("last")
    return letters.astype(np.int32), lengths.astype(np.int32), tags


def loss_of(model: Tagger, letters: Any, lengths: Any, tags: Any) -> jax.Array:
    """Returns the mean cross-entropy of the tags, without padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        jax.vmap(model)(letters, lengths), tags
    )
    return jnp.mean(losses, where=jnp.arange(letters.shape[1]) < lengths[:, None])


@eqx.filter_jit
def train_step(
    optimiser: optax.GradientTransformation,
    model: Tagger,
    opt_state: optax.OptState,
    batch: tuple[np.ndarray, ...],
) -> tuple[Tagger, optax.OptState, jax.Array]:
    """Returns the new model, the new state of the optimiser, and the loss."""
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, opt_state = optimiser.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def predict(model: Tagger, letters: Any, lengths: Any) -> jax.Array:
    """Returns the most likely tag of each letter."""
    return jnp.argmax(jax.vmap(model)(letters, lengths), axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d-model", type=number(int, 1), default=16)
    parser.add_argument("--layers", type=number(int, 1), default=1)
    parser.add_argument(
        "--longest", type=number(int, 1), default=48, help="maximum letters of a sequence"
    )
    parser.add_argument("--steps", type=number(int, 1), default=400)
    parser.add_argument("--batch", type=number(int, 1), default=32)
    parser.add_argument("--lr", type=number(float, 0), default=1e-2)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    mbx.use_compilation_cache()

    start = time.process_time()
    letters, lengths, tags = make_sequences(np.random.default_rng(args.seed + 1), 256, args.longest)
    real = np.arange(args.longest) < lengths[:, None]
    often = np.bincount(tags[real]).max() / real.sum()
    print(f"most frequent tag: {often:.1%} of all tags")
    for name in ("causal", "bidirectional"):
        model = Tagger(
            args.d_model,
            args.layers,
            bidirectional=name == "bidirectional",
            key=jr.key(args.seed),
        )
        schedule = optax.cosine_decay_schedule(args.lr, args.steps)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
        rng = np.random.default_rng(args.seed)
        for _ in range(args.steps):
            batch = make_sequences(rng, args.batch, args.longest)
            model, opt_state, _ = train_step(optimiser, model, opt_state, batch)
        found = predict(model, letters, lengths)
        size = sum(leaf.size for leaf in jax.tree.leaves(model))
        parts = (f"{tag} {np.mean((found == tags)[real & (tags == i)]):.1%}"
                 for i, tag in enumerate(TAGS) if np.any(real & (tags == i)))  # fmt: skip
        print(
            f"{name}: {size:,} parameters, {np.mean((found == tags)[real]):.1%} of the tags correct"
        )
        print(f"  by tag: {', '.join(parts)}", flush=True)
    print(f"{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
