"""The model that a command runs, its tokenizer, and how tokens are chosen."""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr

from ..generation import DecodingState, Sampling, Stream, sampling, stream
from ..models import LanguageModel
from ..pretrained import load, load_tokenizer, open_source, read_checkpoint, read_tokenizer
from ..shipped import SHIPPED
from ..text import ByteTokenizer, TextTokenizer
from ._terminal import add_hub, hub_of


_BYTES = "bytes"


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer, of one and the same commit."""

    model: LanguageModel
    tokenizer: TextTokenizer | ByteTokenizer

    @property
    def stop_tokens(self) -> list[int]:
        end = self.tokenizer.end if isinstance(self.tokenizer, TextTokenizer) else None
        return [] if end is None else [end]

    def encode_piece(self, text: str) -> list[int]:
        """The tokens of a part of a text: nothing is put around it."""
        if isinstance(self.tokenizer, TextTokenizer):
            return self.tokenizer.encode_piece(text)
        return self.tokenizer.encode(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        help="the folder of a checkpoint, or a repository on the Hugging Face Hub (default: the "
        "Shakespeare model of this package)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help=f"a folder or repository with a tokenizer, or `{_BYTES}` (default: the checkpoint's)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "stored"),
        default="float32",
        help="of the parameters: the fastest on a CPU is float32 (default: %(default)s)",
    )
    add_hub(parser)


def open_model(args: argparse.Namespace) -> Opened:
    """The model and the tokenizer that the arguments of `add_model` name."""
    hub = hub_of(args)
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
            f"has a vocabulary of {model.vocab_size}: give the tokenizer that it was trained with, by "
            "--tokenizer."
        )
    return Opened(model, tokenizer)


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The arguments of `stream_of`."""

    def add(
        name: str, metavar: str, kind: type, text: str, default: int | float | None = None
    ) -> None:
        if default is not None:
            text += " (default: %(default)s)"
        parser.add_argument(name, metavar=metavar, type=kind, help=text, default=default)

    add("--max-new-tokens", "N", int, "the most tokens to write", max_new_tokens)
    add("--temperature", "T", float, "0 always takes the most likely token", 0.8)
    add("--top-k", "K", int, "sample from the K most likely tokens")
    add("--top-p", "P", float, "sample from the most likely tokens of total probability P")
    add("--min-p", "P", float, "sample from tokens at least P times as likely as the best one")
    add("--typical-p", "P", float, "sample from the most typical tokens of total probability P")
    add("--repetition-penalty", "X", float, "divide the logits of the last tokens by this", 1.0)
    add("--presence-penalty", "X", float, "subtract this from the logits of the last tokens", 0.0)
    add("--frequency-penalty", "X", float, "subtract this for each time that they occur", 0.0)
    add("--penalty-window", "N", int, "how many of the last tokens these look at", 64)
    add("--seed", "SEED", int, "of the random numbers", 0)


def check_sampling(args: argparse.Namespace) -> None:
    """What can be said before a model is loaded."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be within 0..{2**32 - 1}, but got {args.seed}.")
    if "" in args.stop:
        raise ValueError("--stop must not be empty: leave it out for no such end.")


def stream_of(
    opened: Opened,
    prompt: Sequence[int],
    args: argparse.Namespace,
    *,
    state: DecodingState | None = None,
    stop_strings: Sequence[str] = (),
) -> Stream:
    model, tokenizer = opened.model, opened.tokenizer
    penalties = sampling.Penalties(
        repetition=args.repetition_penalty,
        presence=args.presence_penalty,
        frequency=args.frequency_penalty,
        window=args.penalty_window,
    )
    neutral = sampling.Penalties(window=args.penalty_window)
    # Some models have more tokens than their tokenizers: padding, which means nothing.
    no_text = range(tokenizer.vocab_size, model.vocab_size)
    options = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        penalties=None if penalties == neutral else penalties,
        logit_bias=dict.fromkeys(no_text, -math.inf) or None,
        stop_tokens=opened.stop_tokens,
        stop_strings=stop_strings,
        tokenizer=tokenizer if stop_strings else None,
    )
    key = jr.key(args.seed)
    return stream(model, prompt, args.max_new_tokens, options, state=state, key=key)


def text_of(opened: Opened, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, as they come."""
    decoder = opened.tokenizer.decoder()
    for token in tokens:
        yield decoder.feed([token])
    yield decoder.end()


def _shipped_model() -> Path:
    if not SHIPPED.exists():
        raise FileNotFoundError(
            f"This installation has no model of its own (looked at {SHIPPED}): give one by --model."
        )
    return SHIPPED
