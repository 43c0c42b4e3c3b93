"""Trains hybrids of Mamba and attention on a recall task that exceeds a small state.

    python examples/hybrid.py

A sequence lists pairs of a key and a value, with different keys, and then queries the keys; the
model must answer each with its value. Attention looks the pair up, whereas a recurrent state must
store all pairs. Three models with two layers and about the same size are compared:

- Mamba only;
- a hybrid defined by a tuple of mixer configs;
- a custom hybrid: an ordinary Equinox module with a `Block` and an
  `equinox.nn.MultiheadAttention`.
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


class CustomHybrid(eqx.Module):
    """A Mamba block followed by attention.

    The convolution of the block combines each key with its value, so one layer of attention is
    enough. There are no other positional encodings.
    """

    embedding: eqx.nn.Embedding
    block: mbx.Block
    norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, vocab: int, d_model: int, d_state: int, *, key: jax.Array):
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Embedding(vocab, d_model, key=keys[0])
        self.block = mbx.Block(mbx.Mamba1(d_model, d_state=d_state, key=keys[1]))
        self.norm = eqx.nn.RMSNorm(d_model)
        self.attention = eqx.nn.MultiheadAttention(2, d_model, key=keys[2])
        self.head = eqx.nn.Linear(d_model, vocab, key=keys[3])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.block(jax.vmap(self.embedding)(tokens))
        y = jax.vmap(self.norm)(x)
        causal = jnp.tri(len(tokens), dtype=bool)
        return jax.vmap(self.head)(x + self.attention(y, y, y, mask=causal))


Model = mbx.LanguageModel | CustomHybrid


def make_models(vocab: int, d_model: int, d_state: int, key: jax.Array) -> dict[str, Model]:
    """Builds the three models, by name."""

    def build(*mixers: mbx.models.AbstractMixerConfig) -> mbx.LanguageModel:
        blocks = tuple(mbx.BlockConfig(mixer) for mixer in mixers)
        return mbx.LanguageModelConfig(vocab, blocks, tie_embeddings=False).build(key=key)

    mamba = mbx.Mamba1Config(d_model, d_state=d_state)
    attention = mbx.AttentionConfig(d_model, nheads=2)
    return {
        "Mamba, Mamba": build(mamba, mamba),
        "Mamba, attention": build(mamba, attention),
        "custom module": CustomHybrid(vocab, d_model, d_state, key=key),
    }


def make_recall(
    rng: np.random.Generator, count: int, keys: int, pairs: int
) -> tuple[np.ndarray, ...]:
    """Returns tokens, the target of each, and a mask of the queries, shared by all rows.

    Keys are the tokens below `keys`; values are the tokens from `keys` on.
    """
    chosen = np.argsort(rng.random((count, keys)), axis=1)[:, :pairs]
    values = keys + rng.integers(keys, size=(count, pairs))
    order = np.argsort(rng.random((count, pairs)), axis=1)
    asked = np.take_along_axis(chosen, order, axis=1)
    answers = np.take_along_axis(values, order, axis=1)
    listed = np.stack([chosen, values], axis=2).reshape(count, -1)
    tokens = np.concatenate([listed, asked], axis=1)
    targets = np.concatenate([np.zeros_like(listed), answers], axis=1)
    return tokens.astype(np.int32), targets.astype(np.int32), np.arange(3 * pairs) >= 2 * pairs


def loss_of(model: Model, tokens: Any, targets: Any, asked: Any) -> jax.Array:
    """Returns the mean cross-entropy of the answers."""
    losses = optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(tokens), targets)
    return jnp.mean(losses, where=asked)


@eqx.filter_jit
def train_step(
    optimiser: optax.GradientTransformation,
    model: Model,
    opt_state: optax.OptState,
    batch: tuple[np.ndarray, ...],
) -> tuple[Model, optax.OptState, jax.Array]:
    """Returns the new model, the new state of the optimiser, and the loss."""
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, opt_state = optimiser.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def predict(model: Model, tokens: Any) -> jax.Array:
    """Returns the most likely token at each place."""
    return jnp.argmax(jax.vmap(model)(tokens), axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=number(int, 1), default=16, help="number of different keys")
    parser.add_argument("--pairs", type=number(int, 1), default=8, help="pairs per sequence")
    parser.add_argument("--d-model", type=number(int, 1), default=32)
    parser.add_argument("--d-state", type=number(int, 1), default=4)
    parser.add_argument("--steps", type=number(int, 1), default=400)
    parser.add_argument("--batch", type=number(int, 1), default=32)
    parser.add_argument("--lr", type=number(float, 0), default=5e-3)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    mbx.use_compilation_cache()
    if args.pairs > args.keys:
        parser.error(f"--pairs must be at most --keys, but got {args.pairs} and {args.keys}")

    print(f"{args.pairs} pairs of {args.keys} keys and values; chance is {1 / args.keys:.1%}")
    start = time.process_time()
    models = make_models(2 * args.keys, args.d_model, args.d_state, jr.key(args.seed))
    for name, model in models.items():
        schedule = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 10, args.steps)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        opt_state, rng = optimiser.init(eqx.filter(model, eqx.is_array)), np.random.default_rng(0)
        for _ in range(args.steps):
            batch = make_recall(rng, args.batch, args.keys, args.pairs)
            model, opt_state, _ = train_step(optimiser, model, opt_state, batch)
        tokens, targets, asked = make_recall(
            np.random.default_rng(args.seed + 1), 256, args.keys, args.pairs
        )
        found = predict(model, tokens)
        size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        right = np.mean((found == targets)[:, asked])
        print(f"{name}: {size:,} parameters, {right:.1%} recalled", flush=True)
    print(f"{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
