"""Adapts the model that ships, or another one over bytes, to a text: in three ways.

    python examples/finetune.py --method lora --out runs/lora      # a low-rank change of weights
    python examples/finetune.py --method state --out runs/state    # the initial state alone
    python examples/finetune.py --method freeze --out runs/freeze  # some parameters, by name

All three train a part and leave the rest exactly as it is. The last tenth of the text is held out.
By default the text is this package's documentation, which is not what Shakespeare wrote.
"""

import argparse
import importlib.resources
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, begin, load_lora, save_lora


ROOT = Path(__file__).parents[1]
SHIPPED = Path(str(importlib.resources.files("mamba_eqx"))) / "models" / "shakespeare"
TOKENIZER = mbx.ByteTokenizer()
FIRST = ord("\n")  # every row begins with it, in training as in use

# What is trained, to the model and the initial state of its layers.
Use = Callable[[Any], tuple[mbx.LanguageModel, Any]]


def read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and the held-out ones."""
    text = np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


def with_lora(model: mbx.LanguageModel, rank: int, key: jax.Array) -> tuple[Any, Use]:
    lora = LoRA.init(model, rank=rank, alpha=2 * rank, key=key)
    return lora, lambda lora: (lora.merge(model), model.init_state())


def with_state(model: mbx.LanguageModel) -> tuple[Any, Use]:
    return model.init_state(), lambda state: (model, state)


def with_frozen(model: mbx.LanguageModel, names: list[str]) -> tuple[Any, Use]:
    """Trains the parameters that have one of these names in their path: Equinox's `partition`."""

    def is_trained(path: Any, _: Any) -> bool:
        return any(f".{name}" in jax.tree_util.keystr(path) for name in names)

    mask = jax.tree_util.tree_map_with_path(is_trained, model)
    trained, frozen = eqx.partition(model, mask)
    return trained, lambda trained: (eqx.combine(trained, frozen), model.init_state())


def rows_of(text: np.ndarray, starts: np.ndarray, length: int) -> jax.Array:
    """Rows of `length + 1` bytes, each with a newline in front."""
    rows = text[starts[:, None] + np.arange(length)]
    return jnp.asarray(np.pad(rows, ((0, 0), (1, 0)), constant_values=FIRST), jnp.int32)


def nats(use: Use, part: Any, rows: jax.Array) -> jax.Array:
    model, state = use(part)
    logits = jax.vmap(lambda row: model.scan(row[:-1], state)[0])(rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=("lora", "state", "freeze"), default="lora")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="the folder of a checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", help="files (default: the documentation)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the result")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument(
        "--train", nargs="+", default=["norm", "A_log", "D", "dt_bias", "conv1d"],
        help="with freeze: parts of the names of the parameters to train",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="bytes of a row")
    parser.add_argument("--lr", type=float, help="the peak (default: by the method)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = mbx.from_pretrained(args.model, dtype=jnp.float32)
    train, held_out = read(args.text or sorted((ROOT / "docs").rglob("*.md")))
    part, use = {
        "lora": lambda: with_lora(model, args.rank, jr.key(args.seed)),
        "state": lambda: with_state(model),
        "freeze": lambda: with_frozen(model, args.train),
    }[args.method]()
    lr = args.lr or {"lora": 5e-3, "state": 5e-2, "freeze": 1e-2}[args.method]
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(lr, args.steps))
    )

    @jax.jit
    def step(part: Any, opt_state: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda part: nats(use, part, rows))(part)
        updates, opt_state = optimiser.update(grads, opt_state, part)
        return optax.apply_updates(part, updates), opt_state, loss

    check = rows_of(held_out, np.arange(0, len(held_out) - args.length, args.length), args.length)
    score = jax.jit(lambda part: nats(use, part, check) / np.log(2))
    size = sum(leaf.size for leaf in jax.tree.leaves(part))
    whole = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{args.method}: {size:,} numbers are trained, the model has {whole:,}")
    print(f"{len(train):,} bytes to train on, {check.size - len(check):,} held out")
    before = float(score(part))
    opt_state, rng, start = (
        optimiser.init(part),
        np.random.default_rng(args.seed),
        time.process_time(),
    )
    for i in range(1, args.steps + 1):
        starts = rng.integers(len(train) - args.length, size=args.batch)
        part, opt_state, loss = step(part, opt_state, rows_of(train, starts, args.length))
        if i % 100 == 0:
            print(f"step {i}: {float(loss) / np.log(2):.3f} bits per byte", flush=True)
    print(f"held out: {before:.3f} bits per byte before, {float(score(part)):.3f} after", end="")
    print(f" ({args.steps} steps, {time.process_time() - start:.0f} s of processor time)")

    tuned, state = use(part)
    prefix = begin(tuned, state, FIRST)
    prompt = TOKENIZER.encode("The ")
    out = mbx.generate(tuned, prompt, 120, temperature=0.7, key=jr.key(args.seed), state=prefix)
    print(repr("The " + TOKENIZER.decode(out.tokens.tolist())))

    args.out.mkdir(parents=True, exist_ok=True)
    if args.method == "lora":
        save_lora(part, model, args.out, base_model=str(args.model))
        assert eqx.tree_equal(load_lora(args.out, model), part)
    elif args.method == "state":
        mbx.save_state(args.out / "prefix.safetensors", prefix, model)
    else:
        mbx.save_pretrained(tuned, args.out)
        mbx.save_tokenizer(TOKENIZER, args.out)
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
