"""Generating tokens and decoding them as they arrive."""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax.random as jr

from ..generation import DecodingState, FinishReason, Sampling, Stream, stream
from ..text import text_until
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


@dataclasses.dataclass
class Reply:
    """The text of a stream, up to a stop text.

    - `stream`: the tokens.
    - `text`: the text so far.
    - `ids`: the tokens consumed so far.
    - `stopped`: whether the text ended before a stop text.
    """

    stream: Stream
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    stopped: bool = False

    def pieces(
        self,
        opened: Opened,
        stops: Sequence[str],
        *,
        prompt: Sequence[int],
        tokens: Iterable[int] | None = None,
    ) -> Iterator[str]:
        """Yields the text of each token as soon as its characters are complete.

        **Arguments:**

        - `opened`: the tokenizer is taken from here.
        - `stops`: the stop texts.
        - `prompt`: the tokens that the text continues, which decide whether it begins with a space.
        - `tokens`: the iterator over the tokens of the stream, if not the stream itself.
        """
        decoded = 0

        def decode() -> Iterator[str]:
            nonlocal decoded
            decoder = opened.tokenizer.decoder(prompt=prompt)
            for token in self.stream if tokens is None else tokens:
                self.ids.append(token)
                piece = decoder.feed([token])
                decoded += len(piece)
                yield piece
            rest = decoder.flush()
            decoded += len(rest)
            yield rest

        for piece in text_until(stops, decode()):
            self.text += piece
            yield piece
        # Only a stop text keeps decoded text back.
        self.stopped = decoded > len(self.text)

    @property
    def finish(self) -> FinishReason | None:
        """The reason why the text ended, or `None` if it was interrupted."""
        return FinishReason.STOP_STRING if self.stopped else self.stream.finish
