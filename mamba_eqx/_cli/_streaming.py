"""Generating tokens and decoding them as they arrive."""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence

import jax.random as jr

from ..generation import DecodingState, Stream, sampling, stream
from ..text import TextTokenizer
from ._opened import Opened


def start_stream(
    opened: Opened,
    prompt: Sequence[int],
    args: argparse.Namespace,
    *,
    state: DecodingState | None = None,
    stop_strings: Sequence[str] = (),
) -> Stream:
    """Starts generating tokens after a prompt, with the options of `add_sampling`."""
    model, tokenizer = opened.model, opened.tokenizer
    penalties = sampling.Penalties(
        repetition=args.repetition_penalty,
        presence=args.presence_penalty,
        frequency=args.frequency_penalty,
        window=args.penalty_window,
    )
    neutral = sampling.Penalties(window=args.penalty_window)
    end = tokenizer.eos_token_id if isinstance(tokenizer, TextTokenizer) else None
    # The vocabulary of a model may be padded beyond its tokenizer. Padded ids are banned.
    padding = range(tokenizer.vocab_size, model.vocab_size)
    return stream(
        model,
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        penalties=None if penalties == neutral else penalties,
        logit_bias=dict.fromkeys(padding, -math.inf) or None,
        stop_tokens=[] if end is None else [end],
        stop_strings=stop_strings,
        tokenizer=tokenizer if stop_strings else None,
        state=state,
        key=jr.key(args.seed),
    )


def decode_stream(opened: Opened, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of each token as soon as its characters are complete."""
    decoder = opened.tokenizer.decoder()
    for token in tokens:
        yield decoder.feed([token])
    yield decoder.flush()
