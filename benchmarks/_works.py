"""The works of `compare.py`: what is measured, on which model, and who takes part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import MIXERS

import mamba_eqx as mbx


Kind = Literal["prefill", "decode", "train"]


@dataclass(frozen=True)
class Work:
    """One kind of work on one model.

    **Fields:**

    - `name`: the name on the command line.
    - `title`: the name in tables and in the figure.
    - `model`: a key of `MODELS`.
    - `kind`: what is done.
    - `batch`, `seq`: the number of sequences, and of tokens in each. In decoding, prompts have one
        token, and `seq` is the number of new ones.
    - `all_logits`: whether a prefill computes all logits, or those of the last token only.
    """

    name: str
    title: str
    model: str
    kind: Kind
    batch: int
    seq: int
    all_logits: bool = False

    def quick(self) -> "Work":
        """Returns the same work with tiny sizes."""
        return replace(self, model=f"tiny {self.model}", seq=8, batch=min(self.batch, 2))

    def inputs(self, vocab_size: int) -> np.ndarray:
        """Returns random tokens: of one sequence, or of shape `(batch, 1)` for decoding."""
        shape = {
            "prefill": (self.seq,),
            "decode": (self.batch, 1),
            "train": (self.batch, self.seq),
        }[self.kind]
        return np.array(jr.randint(jr.key(1), shape, 0, vocab_size, jnp.int32), np.int64)


# --- Models ---


def _mamba(mixer: str, d_model: int, n_layer: int, vocab_size: int) -> mbx.LanguageModelConfig:
    block = mbx.BlockConfig(MIXERS[mixer](d_model))
    return mbx.LanguageModelConfig(vocab_size, (block,) * n_layer)


# The layers of Granite-4.0-H-350M that are attention; the others are Mamba-2. Each has a gated MLP.
_ATTENTION = (10, 13, 17, 27)


def _granite(*, quick: bool = False) -> mbx.LanguageModelConfig:
    d_model, d_intermediate, nheads, nheads_kv = (64, 96, 2, 1) if quick else (768, 2048, 12, 4)
    mamba = mbx.Mamba2Config(d_model, headdim=32, d_state=16 if quick else 128)
    attention = mbx.AttentionConfig(
        d_model, nheads=nheads, nheads_kv=nheads_kv, softmax_scale=0.015625
    )
    mlp = mbx.GatedMLPConfig(d_intermediate)
    mamba_block, attention_block = (
        mbx.BlockConfig(mixer, mlp=mlp, residual_multiplier=0.246) for mixer in (mamba, attention)
    )
    layers = [attention_block if i in _ATTENTION else mamba_block for i in range(32)]
    return mbx.LanguageModelConfig(
        256 if quick else 100352,
        tuple(layers[9:11] if quick else layers),
        embedding_multiplier=12.0,
        logits_multiplier=1 / 3,
        residual_in_fp32=False,
    )


MODELS: dict[str, Callable[[], mbx.LanguageModelConfig]] = {
    "mamba-130m": lambda: _mamba("mamba1", 768, 24, 50280),
    "mamba2-130m": lambda: _mamba("mamba2", 768, 24, 50288),
    "mamba, d_model 256": lambda: _mamba("mamba1", 256, 8, 256),
    "mamba, d_model 768": lambda: _mamba("mamba1", 768, 6, 256),
    "mamba2, d_model 256": lambda: _mamba("mamba2", 256, 8, 256),
    "granite-350m": _granite,
}


def build(name: str) -> mbx.LanguageModel:
    """Builds a model with random weights. Names that start with `tiny` are those of `quick`."""
    if name.startswith("tiny"):
        mixer = "mamba2" if "mamba2" in name else "mamba1"
        tiny = _granite(quick=True) if "granite" in name else _mamba(mixer, 64, 2, 256)
        return tiny.build(key=jr.key(0))
    return MODELS[name]().build(key=jr.key(0))


def operations(model: mbx.LanguageModel) -> int:
    """Returns the operations per token of all products with weights, in the forward pass."""

    def is_linear(node: object) -> bool:
        return isinstance(node, mbx.layers.AbstractLinear)

    linears = filter(is_linear, jax.tree.leaves(model, is_leaf=is_linear))
    weights = sum(linear.weight.size for linear in linears)
    if model.lm_head is None:
        weights += model.embedding.weight.size
    return 2 * weights


# --- Works ---


def _works(model: str, prefix: str = "", title: str = "") -> Iterator[Work]:
    for seq in (64, 512, 2048):
        for which in ("all", "last"):
            name, full = f"prefill-{seq}-{which}", f"prefill, {seq} tokens, {which} logits"
            yield Work(prefix + name, title + full, model, "prefill", 1, seq, which == "all")
    yield Work(f"{prefix}decode-1", f"{title}decoding, 1 sequence", model, "decode", 1, 32)
    yield Work(f"{prefix}decode-8", f"{title}decoding, 8 sequences", model, "decode", 8, 32)


_ALL = (
    *_works("mamba-130m"),
    Work("train-256", "training step, d_model 256", "mamba, d_model 256", "train", 1, 512),
    Work("train-256-batch", "training step, 4 x 256 tokens", "mamba, d_model 256", "train", 4, 256),
    Work("train-768", "training step, d_model 768", "mamba, d_model 768", "train", 1, 512),
    *(
        work
        for work in _works("granite-350m", "granite-", "Granite 350M, ")
        if work.seq == 512 or work.name == "granite-decode-1"
    ),
    *_works("mamba2-130m", "mamba2-", "Mamba-2, "),
    Work("mamba2-train-256", "Mamba-2, training step", "mamba2, d_model 256", "train", 1, 512),
)
WORKS = {work.name: work for work in _ALL}

# One of each kind, with and without attention, to check that the script runs.
_QUICK = (
    *("prefill-64-all", "decode-1", "train-256"),
    *("granite-prefill-512-all", "granite-decode-1"),
)

# How many times as fast as a contestant mamba_eqx in float32 is meant to be.
WANTED: dict[str, dict[str, float]] = {
    "prefill-512-all": {"transformers": 3.5, "llama.cpp": 1.6},
    "prefill-2048-all": {"transformers": 3.5, "llama.cpp": 1.6},
    "decode-1": {"llama.cpp": 1.0},
    "decode-8": {"llama.cpp": 1.5},
    "train-256": {"transformers": 25, "mamba.py": 2},
    "granite-prefill-512-all": {"transformers": 3},
    "granite-prefill-512-last": {"transformers": 3},
    "granite-decode-1": {"transformers": 1.3},
}


def select(names: Sequence[str], *, quick: bool) -> list[Work]:
    """Returns the works whose name is one of `names` or starts with it; all works for no names.

    **Arguments:**

    - `names`: the names from the command line.
    - `quick`: whether to return only a few of them, with tiny sizes.

    **Raises:** a `SystemExit` that lists the works if a name selects none.
    """
    for name in names:
        if not any(work.startswith(name) for work in WORKS):
            raise SystemExit(f"There is no work {name!r}. The works are: {', '.join(WORKS)}.")
    works = [
        work for work in _ALL if not names or any(work.name.startswith(name) for name in names)
    ]
    return [work.quick() for work in works if work.name in _QUICK] if quick else works


# --- Contestants ---


@dataclass(frozen=True)
class Entry:
    """A contestant.

    **Fields:**

    - `library`: its name in tables.
    - `form`: the form of its weights, and options of ours.
    - `module`: the file in `contestants/` that runs it.
    - `bound`: the largest difference from mamba_eqx in float32 that its outputs may have, relative
        to the largest output.
    - `kinds`: the kinds of work in which it takes part.
    """

    library: str
    form: str
    module: str
    bound: float
    kinds: tuple[Kind, ...] = ("prefill", "decode", "train")

    @property
    def name(self) -> str:
        """The name in tables and on the command line."""
        return f"{self.library}, {self.form}"


_EXACT = 1e-3
# Weights of 8 bits of precision err by 0.4 % each, those of 4 bits by several percent.
_NARROW, _FOUR_BITS = 0.05, 0.3
_INFERENCE: tuple[Kind, ...] = ("prefill", "decode")

OURS = "mamba_eqx"
ENTRIES = (
    Entry(OURS, "float32", "mamba_eqx", _EXACT),
    Entry(OURS, "bfloat16", "mamba_eqx", _NARROW),
    Entry(OURS, "8 bits", "mamba_eqx", _NARROW, _INFERENCE),
    Entry(OURS, "4 bits", "mamba_eqx", _FOUR_BITS, _INFERENCE),
    Entry(OURS, "8 bits, without kernel", "mamba_eqx", _NARROW, ("decode",)),
    Entry(OURS, "4 bits, without kernel", "mamba_eqx", _FOUR_BITS, ("decode",)),
    Entry(OURS, "float32, stacked", "mamba_eqx", _EXACT),
    Entry(OURS, "float32, loop over step", "mamba_eqx", _EXACT, ("decode",)),
    Entry(OURS, "float32, remat", "mamba_eqx", _EXACT, ("train",)),
    Entry(OURS, "float32, stacked, remat", "mamba_eqx", _EXACT, ("train",)),
    Entry(OURS, "float32, stacked, remat but products", "mamba_eqx", _EXACT, ("train",)),
    Entry("transformers", "float32", "transformers", _EXACT),
    Entry("transformers", "bfloat16", "transformers", _NARROW, _INFERENCE),
    Entry("mamba.py", "float32", "mambapy", _EXACT),
    Entry("llama.cpp", "float32", "llama_cpp", _EXACT, _INFERENCE),
    Entry("llama.cpp", "bfloat16", "llama_cpp", _NARROW, _INFERENCE),
    Entry("llama.cpp", "Q8_0", "llama_cpp", _NARROW, _INFERENCE),
    Entry("llama.cpp", "Q4_0", "llama_cpp", _FOUR_BITS, _INFERENCE),
    Entry("jax-linear-attention", "float32", "jax_linear_attention", _EXACT),
)
REFERENCE = ENTRIES[0]
