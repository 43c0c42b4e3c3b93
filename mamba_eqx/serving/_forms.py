"""The JSON of answers, in the two forms of OpenAI's API."""

import abc
import secrets
import time
from collections.abc import Sequence

from ._texts import Shown


class Form(abc.ABC):
    """One answer: its id, and the JSON of its whole and of its pieces."""

    kind: str
    piece_kind: str
    prefix: str

    def __init__(self, model: str):
        self.id = self.prefix + secrets.token_hex(12)
        self._model, self._created = model, int(time.time())

    def whole(
        self, choices: Sequence[dict[str, object]], usage: dict[str, object]
    ) -> dict[str, object]:
        """Returns an answer that is not streamed."""
        return self._head(self.kind) | {"choices": list(choices), "usage": usage}

    def piece(
        self, choices: Sequence[dict[str, object]], usage: dict[str, object] | None = None
    ) -> dict[str, object]:
        """Returns a piece of a streamed answer."""
        found = self._head(self.piece_kind) | {"choices": list(choices)}
        return found if usage is None else found | {"usage": usage}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    @abc.abstractmethod
    def begin(self, index: int) -> dict[str, object] | None:
        """Returns what a stream begins with for a choice, if anything."""

    @abc.abstractmethod
    def delta(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        """Returns the new text of a choice."""

    @abc.abstractmethod
    def choice(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        """Returns the whole text of a choice."""


class Completion(Form):
    """Answers of `/v1/completions`."""

    kind = piece_kind = "text_completion"
    prefix = "cmpl-"

    def begin(self, index: int) -> None:
        return None

    def delta(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        return self.choice(index, text, shown, finish)

    def choice(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        log_probs = None
        if shown is not None:
            log_probs = {
                "tokens": [token.text for token in shown],
                "token_logprobs": [token.log_prob for token in shown],
                "top_logprobs": [_by_text(token) for token in shown],
                "text_offset": [token.offset for token in shown],
            }
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish}


def _by_text(token: Shown) -> dict[str, float]:
    """Returns the most likely texts. Of tokens with the same text, the most likely one counts."""
    found: dict[str, float] = {}
    for text, _, log_prob in token.top:
        found.setdefault(text, log_prob)
    return found


class Chat(Form):
    """Answers of `/v1/chat/completions`."""

    kind, piece_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def begin(self, index: int) -> dict[str, object]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        delta = {"content": text} if text or finish is None else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": _chat_log_probs(shown),
            "finish_reason": finish,
        }

    def choice(
        self, index: int, text: str, shown: Sequence[Shown] | None, finish: str | None
    ) -> dict[str, object]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_log_probs(shown),
            "finish_reason": finish,
        }


def _chat_log_probs(shown: Sequence[Shown] | None) -> dict[str, object] | None:
    if shown is None:
        return None
    content = [
        _chat_token(token.text, token.data, token.log_prob)
        | {"top_logprobs": [_chat_token(*other) for other in token.top]}
        for token in shown
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: str, data: bytes, log_prob: float) -> dict[str, object]:
    return {"token": text, "bytes": list(data), "logprob": log_prob}
