"""The command-line options for sampling tokens."""

import argparse
import math
from collections.abc import Sequence

from ..generation import Sampling, sampling
from ..text import TextTokenizer
from ._opened import Opened


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Adds the options for sampling tokens. `max_new_tokens` is the default of that option."""

    def add(name: str, metavar: str, kind: type, text: str, default: int | float | None) -> None:
        shown = "off" if default is None else default
        text = f"{text} (default: {shown})"
        parser.add_argument(name, metavar=metavar, type=kind, help=text, default=default)

    add("--max-new-tokens", "N", int, "maximum number of tokens to generate", max_new_tokens)
    add("--temperature", "T", float, "sampling temperature; 0 takes the most likely token", 0.8)
    add("--top-k", "K", int, "sample from the K most likely tokens", None)
    add("--top-p", "P", float, "sample from the most likely tokens with total probability P", None)
    add("--min-p", "P", float, "sample from tokens at least P times as likely as the best", None)
    add("--typical-p", "P", float, "sample from typical tokens with total probability P", None)
    add("--repetition-penalty", "X", float, "divide the logits of recent tokens by X", 1.0)
    add("--presence-penalty", "X", float, "subtract X from the logits of recent tokens", 0.0)
    add("--frequency-penalty", "X", float, "subtract X for each recent occurrence of a token", 0.0)
    add("--penalty-window", "N", int, "number of recent tokens that penalties consider", 64)
    add("--seed", "SEED", int, "seed of the random numbers", 0)


def check_sampling(args: argparse.Namespace) -> None:
    """Validates the options that can be validated before a model is loaded.

    **Raises:** `ValueError` for an option that is out of range.
    """
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be within 0..{2**32 - 1}, but got {args.seed}.")
    if "" in args.stop:
        raise ValueError("--stop must not be empty. Give at least one character, or omit --stop.")


def sampling_from_args(
    args: argparse.Namespace, opened: Opened, *, stop_strings: Sequence[str] = ()
) -> Sampling:
    """Returns the sampling options for a model, as the options of `add_sampling` describe them."""
    model, tokenizer = opened.model, opened.tokenizer
    penalties = sampling.Penalties(
        repetition=args.repetition_penalty,
        presence=args.presence_penalty,
        frequency=args.frequency_penalty,
        window=args.penalty_window,
    )
    neutral = sampling.Penalties(window=args.penalty_window)
    eos = tokenizer.eos_token_id if isinstance(tokenizer, TextTokenizer) else None
    # The vocabulary of a model may be padded beyond its tokenizer. Padded ids are banned.
    padding = range(tokenizer.vocab_size, model.vocab_size)
    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        penalties=None if penalties == neutral else penalties,
        logit_bias=dict.fromkeys(padding, -math.inf) or None,
        stop_tokens=[] if eos is None else [eos],
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
