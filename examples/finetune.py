"""Fine-tunes the bundled model, or another byte-level one, on a text by one of three methods.

    python examples/finetune.py --method lora --out runs/lora      # a low-rank change of weights
    python examples/finetune.py --method state --out runs/state    # the initial state only
    python examples/finetune.py --method freeze --out runs/freeze  # some parameters, by name

Each method trains one part and leaves the rest unchanged. The last tenth of the text is held out.
By default the text is the documentation of this package.
"""

import argparse
import math
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.tree_util import KeyPath
from jaxtyping import PyTree
from option_types import number

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, load_lora, save_lora


ROOT = Path(__file__).parents[1]
TOKENIZER = mbx.ByteTokenizer()
FIRST = ord("\n")  # The first byte of every row, in training and in generation.


def read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on, and the held-out ones."""
    text = np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)
    cut = len(text) - len(text) // 10
    return text[:cut], text[cut:]


def split(method: str, model: mbx.LanguageModel, args: argparse.Namespace) -> tuple[PyTree, PyTree]:
    """Returns the part that is trained, and the rest."""
    if method == "lora":
        lora = LoRA.init(model, rank=args.rank, alpha=2 * args.rank, key=jr.key(args.seed))
        return lora, model
    if method == "state":
        return model.init_state(), model

    def is_trained(path: KeyPath, _: object) -> bool:
        return any(f".{name}" in jax.tree_util.keystr(path) for name in args.train)

    return eqx.partition(model, jax.tree_util.tree_map_with_path(is_trained, model))


def join(method: str, part: PyTree, rest: PyTree) -> tuple[mbx.LanguageModel, PyTree | None]:
    """Returns the model made of both parts, and the state that a text starts from; `None` is the
    empty past."""
    if method == "state":
        return rest, part
    return part.merge(rest) if method == "lora" else eqx.combine(part, rest), None


def rows_of(text: np.ndarray, starts: np.ndarray, length: int) -> jax.Array:
    """Returns rows of `length + 1` bytes, each starting with a newline."""
    rows = text[starts[:, None] + np.arange(length)]
    return jnp.asarray(np.pad(rows, ((0, 0), (1, 0)), constant_values=FIRST), jnp.int32)


@eqx.filter_jit
def nats(method: str, part: PyTree, rest: PyTree, rows: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next byte, in nats."""
    model, state = join(method, part, rest)
    logits = jax.vmap(lambda row: model.scan(row[:-1], state)[0])(rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


# `rest` is an argument, because arrays that a compiled function closes over become constants in it.
@eqx.filter_jit
def train_step(
    optimiser: optax.GradientTransformation,
    method: str,
    part: PyTree,
    opt_state: optax.OptState,
    rest: PyTree,
    rows: jax.Array,
) -> tuple[PyTree, optax.OptState, jax.Array]:
    """Returns the new part, the new state of the optimiser, and the loss."""
    loss, grads = jax.value_and_grad(lambda part: nats(method, part, rest, rows))(part)
    updates, opt_state = optimiser.update(grads, opt_state, part)
    return optax.apply_updates(part, updates), opt_state, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("lora", "state", "freeze"), default="lora")
    parser.add_argument("--model", type=Path, default=mbx.SHIPPED, help="folder of a checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", help="text files (default: our docs)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rank", type=number(int, 1), default=8, help="rank of LoRA")
    parser.add_argument(
        "--train", nargs="+", default=["norm", "A_log", "D", "dt_bias", "conv1d"],
        help="parameters to train with --method freeze, by parts of their names",
    )  # fmt: skip
    parser.add_argument("--steps", type=number(int, 1), default=200)
    parser.add_argument("--batch", type=number(int, 1), default=8)
    parser.add_argument("--length", type=number(int, 1), default=128, help="bytes per row")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: by method)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    mbx.use_compilation_cache()
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"argument --lr: must be a positive number, but got {args.lr:g}")
    try:
        model = mbx.from_pretrained(args.model, dtype=jnp.float32)
    except (OSError, ValueError) as error:
        parser.error(f"argument --model: {error}")
    if model.vocab_size != TOKENIZER.vocab_size:
        parser.error(
            f"argument --model: must be a byte-level model of {TOKENIZER.vocab_size} tokens, but "
            f"{args.model} has {model.vocab_size}"
        )
    layout = next(iter(mbx.layouts_for(model)), None)
    if layout is None:
        parser.error(f"argument --model: no layout can store a changed model of {args.model}")
    try:
        train, held_out = read(args.text or sorted((ROOT / "docs").rglob("*.md")))
    except OSError as error:
        parser.error(f"argument --text: {error}")
    if len(held_out) <= args.length:
        parser.error(
            f"argument --text: must have more than {10 * args.length} bytes with --length "
            f"{args.length}, but has {len(train) + len(held_out)}"
        )
    try:
        part, rest = split(args.method, model, args)
    except ValueError as error:  # Attention has no initial state that could be trained.
        parser.error(f"argument --method: {args.method} does not fit the model: {error}")
    if not jax.tree.leaves(part):
        parser.error(
            f"argument --train: must name parameters of the model, but got {' '.join(args.train)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # before the training, whose result it holds
    except OSError as error:
        parser.error(f"argument --out: {error}")
    lr = args.lr or {"lora": 5e-3, "state": 5e-2, "freeze": 1e-2}[args.method]
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(lr, args.steps))
    )

    places = np.arange(0, len(held_out) - args.length, args.length)
    check = rows_of(held_out, places, args.length)
    size = sum(leaf.size for leaf in jax.tree.leaves(part))
    whole = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{args.method}: training {size:,} parameters; the model has {whole:,}")
    print(f"{len(train):,} bytes to train on, {check.size - len(check):,} held out")
    before = float(nats(args.method, part, rest, check)) / np.log(2)
    opt_state, rng, start = (
        optimiser.init(part),
        np.random.default_rng(args.seed),
        time.process_time(),
    )
    for i in range(1, args.steps + 1):
        starts = rng.integers(len(train) - args.length, size=args.batch)
        rows = rows_of(train, starts, args.length)
        part, opt_state, loss = train_step(optimiser, args.method, part, opt_state, rest, rows)
        if i % 50 == 0:
            print(f"step {i}: {float(loss) / np.log(2):.3f} bits per byte", flush=True)
    after = float(nats(args.method, part, rest, check)) / np.log(2)
    print(f"held out: {before:.3f} bits per byte before, {after:.3f} after")
    print(f"{args.steps} steps, {time.process_time() - start:.0f} s of CPU time")

    tuned, state = join(args.method, part, rest)
    prefix = None if state is None else mbx.decoding_state(tuned, state, FIRST)
    prompt = TOKENIZER.encode("The ")
    if prefix is None:
        prompt = [FIRST, *prompt]
    out = mbx.generate(
        tuned, prompt, 120, mbx.Sampling(temperature=0.7), key=jr.key(args.seed), state=prefix
    )
    print(repr("The " + TOKENIZER.decode(out.tokens.tolist())))

    try:
        if args.method == "lora":
            save_lora(part, model, args.out, layout=layout, base_model=str(args.model))
            assert eqx.tree_equal(load_lora(args.out, model, layout=layout), part)
        elif prefix is not None:
            mbx.save_state(args.out / "prefix.safetensors", prefix, model)
        else:
            mbx.save_pretrained(tuned, args.out, layout=layout, tokenizer=TOKENIZER)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
