"""Generating tokens and decoding them as they arrive."""

import argparse
from collections.abc import Iterable, Iterator, Sequence

import jax.random as jr

from ..generation import DecodingState, Sampling, Stream, stream
from ._opened import Opened


def start_stream(
    opened: Opened,
    prompt: Sequence[int],
    args: argparse.Namespace,
    sampling: Sampling,
    *,
    state: DecodingState | None = None,
) -> Stream:
    """Starts generating tokens after a prompt, with the length and the seed given in `args`."""
    key = jr.key(args.seed)
    return stream(opened.model, prompt, args.max_new_tokens, sampling, state=state, key=key)


def decode_stream(opened: Opened, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of each token as soon as its characters are complete."""
    decoder = opened.tokenizer.decoder()
    for token in tokens:
        yield decoder.feed([token])
    yield decoder.flush()
