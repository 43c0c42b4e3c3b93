"""The model and the tokenizer that a command runs."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from ..models import LanguageModel
from ..pretrained import load, load_tokenizer, open_source, read_checkpoint, read_tokenizer
from ..shipped import SHIPPED
from ..text import ByteTokenizer, TextTokenizer
from ._hub_arguments import SOURCE_HELP, add_hub, hub_from_args


_BYTES = "bytes"


@dataclass(frozen=True)
class Opened:
    """A loaded model and its tokenizer."""

    model: LanguageModel
    tokenizer: TextTokenizer | ByteTokenizer

    def encode_piece(self, text: str) -> list[int]:
        """Encodes part of a text, without the tokens that the tokenizer adds to complete texts."""
        if isinstance(self.tokenizer, TextTokenizer):
            return self.tokenizer.encode_piece(text)
        return self.tokenizer.encode(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the model and the tokenizer."""
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        help=f"{SOURCE_HELP} (default: the bundled Shakespeare model)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help=f"folder or repository of the tokenizer, or `{_BYTES}` (default: the checkpoint's)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "stored"),
        default="float32",
        help="dtype of the parameters; float32 is the fastest on a CPU (default: %(default)s)",
    )
    add_hub(parser)


def open_model(args: argparse.Namespace) -> Opened:
    """Loads the model and the tokenizer that the options of `add_model` name.

    **Raises:** `ValueError` if the tokenizer has more tokens than the vocabulary of the model.
    """
    hub = hub_from_args(args)
    source = open_source(_shipped_model() if args.model is None else args.model, hub)
    if args.tokenizer is None:
        tokenizer = read_tokenizer(source, hub)
    elif args.tokenizer == _BYTES:
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(
            args.tokenizer,
            cache_dir=args.cache_dir,
            local_files_only=args.local_files_only,
            endpoint=args.endpoint,
        )
    dtype = None if args.dtype == "stored" else jnp.dtype(args.dtype)
    model = load(read_checkpoint(source), dtype)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model at {source.where} "
            f"has a vocabulary of {model.vocab_size}. Use --tokenizer to name the tokenizer that "
            "it was trained with."
        )
    return Opened(model, tokenizer)


def _shipped_model() -> Path:
    """Returns the folder of the bundled model, or raises if the installation lacks it."""
    if not SHIPPED.exists():
        raise FileNotFoundError(
            f"This installation lacks the bundled model: there is no folder {SHIPPED}. Use --model "
            "to name another one."
        )
    return SHIPPED
