"""From the tokens of a job to the text of a choice."""

from collections.abc import Sequence
from typing import NamedTuple

from ..generation import FinishReason, Job
from ..text import ByteTokenizer, StopFilter, TextTokenizer
from ._errors import ApiError


_REASONS = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.NO_TOKEN: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIME_LIMIT: "length",
}


class Shown(NamedTuple):
    """A token with its probability."""

    text: str
    data: bytes
    log_prob: float
    top: list[tuple[str, bytes, float]]
    offset: int
    """The number of characters of the text before the token."""


class Text:
    """The text of a job, up to a stop string."""

    def __init__(
        self,
        job: Job,
        tokenizer: TextTokenizer | ByteTokenizer,
        stops: Sequence[str],
        log_probs: int | None,
    ):
        """**Arguments:**

        - `job`: the job.
        - `tokenizer`: its tokenizer.
        - `stops`: the stop strings.
        - `log_probs`: how many most likely tokens to show; `None` shows no probabilities.
        """
        self.job = job
        self._tokenizer, self._log_probs = tokenizer, log_probs
        self._decoder = tokenizer.decoder(prompt=job.prompt.tolist())
        self._until = StopFilter(stops)
        self._decoded = 0
        self.read = 0
        """The number of tokens that the text has."""
        self.finish: str | None = None
        """OpenAI's reason for the end, or `None` before it."""

    def take(self, finish: FinishReason | None) -> tuple[str, list[Shown]]:
        """Returns the new text of a job and its new tokens.

        **Arguments:**

        - `finish`: the reason why the job has ended, or `None`.

        **Raises:** `ApiError` if the time of the job was up before its first token.
        """
        if finish == FinishReason.TIME_LIMIT and not self.job.tokens:
            raise ApiError(
                503,
                "The server was too busy to begin this text in time. Try again later.",
                headers={"Retry-After": "1"},
            )
        pieces: list[str] = []
        shown: list[Shown] = []
        end = len(self.job.tokens)
        while self.read < end and not self._until.stopped:
            at, token = self.read, self.job.tokens[self.read]
            self.read += 1
            if self._log_probs is not None:
                shown.append(self._shown(at, token))
            piece = self._decoder.feed([token])
            self._decoded += len(piece)
            pieces.append(self._until.feed(piece))
        if finish is not None and not self._until.stopped:
            pieces.append(self._until.feed(self._decoder.flush()))
            if not self._until.stopped:
                pieces.append(self._until.flush())
        if self._until.stopped:
            self.finish = "stop"
        elif finish is not None:
            self.finish = _REASONS.get(finish)
        return "".join(pieces), shown

    def _shown(self, at: int, token: int) -> Shown:
        top: list[tuple[str, bytes, float]] = []
        if self._log_probs:
            for other, log_prob in self.job.top[at][: self._log_probs]:
                top.append((*self._name(other), log_prob))
        return Shown(*self._name(token), self.job.log_probs[at], top, self._decoded)

    def _name(self, token: int) -> tuple[str, bytes]:
        data = b""
        if token < self._tokenizer.vocab_size:
            data = self._tokenizer.token_bytes(token)
        return data.decode("utf-8", "replace"), data
