"""The model and the tokenizer that a command runs."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp

from .._compilation_cache import use_compilation_cache
from .._processor import multiplies_bfloat16
from ..models import LanguageModel, quantize
from ..pretrained import (
    CONFIGS,
    TOKENIZER,
    Checkpoint,
    Hub,
    Source,
    load,
    open_source,
    read_checkpoint,
    read_tokenizer,
)
from ..shipped import SHIPPED
from ..text import ByteTokenizer, TextTokenizer
from ._adapter import add_adapter, check_adapter, read_adapter
from ._arguments import utf8_text
from ._hub_arguments import SOURCE_HELP, add_hub, check_folder, hub_from_args
from ._quantization import add_bits, quantization_from_args


_BYTES = "bytes"


@dataclass(frozen=True)
class Opened:
    """A loaded model and its tokenizer."""

    model: LanguageModel
    tokenizer: TextTokenizer | ByteTokenizer

    def encode(self, text: str) -> list[int]:
        """Encodes a complete text.

        **Raises:** `ValueError` if the text has no tokens.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise ValueError("The tokenizer finds no tokens in the text. Give a longer text.")
        return ids

    def encode_piece(self, text: str) -> list[int]:
        """Encodes part of a text, without the tokens that the tokenizer adds to complete texts."""
        if isinstance(self.tokenizer, TextTokenizer):
            return self.tokenizer.encode_piece(text)
        return self.tokenizer.encode(text)


def add_model(parser: argparse.ArgumentParser, *, dtype: str = "float32") -> None:
    """Adds the options for the model and the tokenizer.

    **Arguments:**

    - `parser`: the parser of the command.
    - `dtype`: the default of `--dtype`.
    """
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        type=utf8_text,
        help=f"{SOURCE_HELP} (default: the bundled Shakespeare model)",
    )
    add_adapter(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        type=utf8_text,
        help=f"folder or repository of the tokenizer, or `{_BYTES}` (default: the checkpoint's)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "stored"),
        default=dtype,
        help="dtype of the parameters; auto keeps those that are stored in bfloat16 if the "
        "processor has instructions for products in it, and is float32 otherwise (default: "
        "%(default)s)",
    )
    add_bits(parser)
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled programs in the user's cache folder for later runs",
    )
    add_hub(parser)


def open_model(args: argparse.Namespace) -> Opened:
    """Loads the model and the tokenizer that the options of `add_model` name.

    **Raises:** `ValueError` if the tokenizer has tokens that the model lacks, or the adapter does
    not fit; otherwise the errors of `from_pretrained` and `load_tokenizer`.
    """
    check_adapter(args)
    check_folder("--model", args.model)
    if args.tokenizer != _BYTES:
        check_folder("--tokenizer", args.tokenizer)
    if not args.no_compilation_cache:
        use_compilation_cache()
    hub = hub_from_args(args)
    source = open_source(_shipped_model() if args.model is None else args.model, hub)
    # The tokenizer is read first, because it is smaller than the weights. Without a config there
    # is no checkpoint at all, which `read_checkpoint` reports.
    has_config = any(source.find(name) is not None for name in CONFIGS)
    tokenizer = _tokenizer(args.tokenizer, source, hub) if has_config else ByteTokenizer()
    checkpoint = _with_tokens(read_checkpoint(source), tokenizer)
    dtype = _dtype(args.dtype, checkpoint)
    if args.adapter is None:
        model = load(checkpoint, dtype, quantize=quantization_from_args(args))
    else:
        # A LoRA cannot be merged into integers, so the merged model is quantised.
        model = load(checkpoint, dtype)
        model = read_adapter(args.adapter, model, checkpoint.layout.name).merge(model)
        if args.bits is not None:
            model = quantize(model, bits=args.bits)
    return Opened(model, tokenizer)


def _dtype(name: str, checkpoint: Checkpoint) -> jnp.dtype | None:
    """Returns the dtype that `--dtype` names, or `None` for that of the checkpoint."""
    if name == "auto":
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
        keep = multiplies_bfloat16() and stored <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
        name = "stored" if keep else "float32"
    return None if name == "stored" else jnp.dtype(name)


def _tokenizer(name: str | None, source: Source, hub: Hub) -> TextTokenizer | ByteTokenizer:
    """Loads the tokenizer that `--tokenizer` names, or that of the checkpoint."""
    if name == _BYTES:
        return ByteTokenizer()
    if name is None:
        return read_tokenizer(source, hub)
    other = replace(hub, revision=None)
    return read_tokenizer(open_source(name, other, entry_files=(*CONFIGS, TOKENIZER)), other)


def _with_tokens(checkpoint: Checkpoint, tokenizer: TextTokenizer | ByteTokenizer) -> Checkpoint:
    """Returns the checkpoint with a vocabulary that has every token of the tokenizer.

    Tokens may have been added in the padding of the embedding, which has more rows than the config
    has tokens. As in transformers, a config can name a special token that has no row at all, and
    that texts then do without.
    """
    config = checkpoint.config
    rows, ids = config.padded_vocab_size, tokenizer.token_ids
    if isinstance(tokenizer, TextTokenizer):
        ids -= set(tokenizer.special_tokens.values())
    largest = max(ids, default=0)
    if largest >= rows:
        raise ValueError(
            f"The tokenizer has token ids up to {largest}, but the model at {checkpoint.where} "
            f"has a vocabulary of {rows}. Use --tokenizer to name the tokenizer that it was "
            "trained with."
        )
    more = max(min(tokenizer.vocab_size, rows), config.vocab_size)
    return replace(checkpoint, config=replace(config, vocab_size=more))


def _shipped_model() -> Path:
    """Returns the folder of the bundled model, or raises if the installation lacks it."""
    if not SHIPPED.exists():
        raise FileNotFoundError(
            f"This installation lacks the bundled model: there is no folder {SHIPPED}. Use --model "
            "to name another one."
        )
    return SHIPPED
