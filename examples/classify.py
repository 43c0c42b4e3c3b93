"""Fine-tunes the bundled model to tell plays, documentation and Python code apart.

    python examples/classify.py --out runs/kinds                # all parameters
    python examples/classify.py --method lora --out runs/kinds  # a low-rank change of the weights
    python examples/classify.py --method head --out runs/kinds  # the new head only

A text is a piece of up to `--length` bytes, cut out anywhere: of a play of Shakespeare, of this
package's documentation or of its code. One play and every fourth file are held out. Batches are
padded on the right, and `length` is the number of real bytes. At the end the held-out pieces are
read once, byte by byte, and the classifier is asked after 8 bytes, after 16, and so on.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PyTree
from option_types import number

import mamba_eqx as mbx
from mamba_eqx import training


ROOT = Path(__file__).parents[1]
TOKENIZER = mbx.ByteTokenizer()
LABELS = ("play", "documentation", "code")


class Texts(NamedTuple):
    """The texts of each class, as bytes."""

    train: list[list[np.ndarray]]
    held_out: list[list[np.ndarray]]


def read_texts() -> Texts:
    """Reads the texts, and holds some of them out."""
    plays = training.hold_out_documents(
        training.read_tokens(ROOT / "examples" / "data" / "shakespeare.txt.xz"),
        [b"TWELFTH NIGHT"],
        separator=0,
    )
    train, held_out = [[plays[0]]], [[plays[1]]]
    for folder, pattern in (("docs", "*.md"), ("mamba_eqx", "*.py")):
        files = [path.read_bytes() for path in sorted((ROOT / folder).rglob(pattern))]
        texts = [np.frombuffer(file, np.uint8) for file in files if len(file) > 2000]
        train.append([text for i, text in enumerate(texts) if i % 4])
        held_out.append(texts[::4])
    return Texts(train, held_out)


def pieces(
    rng: np.random.Generator, texts: list[list[np.ndarray]], count: int, length: int, shortest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns padded pieces of texts, as many of each class, their lengths and their classes."""
    classes = np.arange(count, dtype=np.int32) % len(texts)
    lengths = rng.integers(shortest, length + 1, count, dtype=np.int32)
    tokens = np.zeros((count, length), np.int32)
    for row, kind, n in zip(tokens, classes, lengths, strict=True):
        text = texts[kind][rng.integers(len(texts[kind]))]
        start = rng.integers(len(text) - n)
        row[:n] = text[start : start + n]
    return tokens, lengths, classes


class Tuned(eqx.Module):
    """The parameters: those of the classifier, and of the change of its backbone if there is
    one."""

    classifier: mbx.SequenceClassifier
    lora: training.LoRA | None

    def merged(self) -> mbx.SequenceClassifier:
        """Returns the classifier with the change."""
        if self.lora is None:
            return self.classifier
        backbone = self.lora.merge(self.classifier.backbone)
        return eqx.tree_at(lambda model: model.backbone, self.classifier, backbone)


def kinds(tuned: Tuned, method: str) -> PyTree[str]:
    """Returns "train" for each parameter that is trained by the method, and "keep" for others."""
    everything = lambda tree, kind: jax.tree.map(lambda _: kind, tree)
    backbone = lambda tuned: tuned.classifier.backbone
    kept = "train" if method == "full" else "keep"
    return eqx.tree_at(
        backbone, everything(tuned, "train"), everything(tuned.classifier.backbone, kept)
    )


def mean_loss(
    tuned: Tuned, batch: tuple[jax.Array, ...], carry: PyTree | None, key: jax.Array
) -> tuple[jax.Array, training.LossAux]:
    """Returns the mean cross-entropy of the classes, as a `training.Loss`."""
    tokens, lengths, classes = batch
    logits = jax.vmap(tuned.merged())(tokens, length=lengths)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.mean(losses), training.LossAux(jnp.asarray(len(classes)), carry)


@eqx.filter_jit
def read(model: mbx.SequenceClassifier, tokens: jax.Array) -> jax.Array:
    """Returns the logits after each byte of each piece."""
    return jax.vmap(lambda row: model.scan(row)[0])(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("full", "lora", "head"), default="full")
    parser.add_argument("--out", type=Path, required=True, help="folder for the classifier")
    parser.add_argument("--steps", type=number(int, 1), default=100)
    parser.add_argument("--batch", type=number(int, 3), default=16)
    parser.add_argument("--length", type=number(int, 16), default=64, help="bytes of a piece")
    parser.add_argument("--rank", type=number(int, 1), default=8, help="rank of LoRA")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--smoke", action="store_true", help="two tiny steps, as a test")
    args = parser.parse_args()
    mbx.use_compilation_cache()
    if args.smoke:
        args.steps, args.batch, args.length = 2, 3, 16
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # before the training, whose result it holds
    except OSError as error:
        parser.error(f"argument --out: {error}")
    texts = read_texts()
    model_key, lora_key = jr.split(jr.key(args.seed))
    model = mbx.from_pretrained(mbx.SHIPPED, dtype=jnp.float32)
    classifier = mbx.SequenceClassifier(model, n_classes=len(LABELS), key=model_key)
    lora = None
    if args.method == "lora":
        lora = training.LoRA.init(model, rank=args.rank, alpha=2 * args.rank, key=lora_key)
    tuned = Tuned(classifier, lora)
    lr = {"full": 1e-3, "lora": 5e-3, "head": 2e-2}[args.method]
    adam = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(lr, args.steps))
    )
    optimiser = optax.multi_transform(
        {"train": adam, "keep": optax.set_to_zero()}, kinds(tuned, args.method)
    )
    train_step = training.TrainStep(optimiser, mean_loss)
    state = train_step.init(tuned, key=jr.key(args.seed))
    rng, start = np.random.default_rng(args.seed), time.process_time()
    for i in range(1, args.steps + 1):
        state, metrics = train_step(state, pieces(rng, texts.train, args.batch, args.length, 8))
        if i % 25 == 0 or i == args.steps:
            print(f"step {i}: loss {float(metrics['loss']):.3f}", flush=True)
    print(f"{args.steps} steps, {time.process_time() - start:.0f} s of CPU time")

    model = state.model.merged()
    rng = np.random.default_rng(args.seed + 1)
    count = 3 if args.smoke else 300
    tokens, _, classes = pieces(rng, texts.held_out, count, args.length, args.length)
    every = np.argmax(read(model, jnp.asarray(tokens)), axis=-1)
    for n in (n for n in (8, 16, 32, 64, 128) if n <= args.length):
        right = np.mean(every[:, n - 1] == classes)
        print(f"after {n} bytes of {count} held-out pieces, {right:.1%} right (chance 33.3%)")
    try:
        mbx.save_classifier(model, args.out, labels=LABELS, tokenizer=TOKENIZER)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    loaded, names = mbx.load_classifier(args.out)
    text = jnp.asarray(TOKENIZER.encode("My liege, the return value is an array."))
    odds = jax.nn.softmax(loaded(text))
    print(", ".join(f"{name} {float(p):.0%}" for name, p in zip(names, odds, strict=True)))
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
