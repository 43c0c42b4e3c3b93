"""Conversations with a model, which keep its state between turns."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..formats import CheckpointError, read_config
from ..generation import DecodingState, load_state, prefill, save_state
from ..text import TextTokenizer
from ._opened import Opened
from ._sampling_arguments import sampling_from_args
from ._streaming import Reply, start_stream


_PLAIN_STOP = "\n\n"
_MAX_HISTORY = 2**26


class PlainConversation:
    """A conversation without a template: a text that the user and the model append to in turn."""

    def __init__(self, opened: Opened, args: argparse.Namespace):
        self._opened, self._args = opened, args
        self._stop = args.stop or [_PLAIN_STOP]
        self._sampling = sampling_from_args(args, opened)
        self.reset()

    def reset(self) -> None:
        self._state: DecodingState | None = None
        self.answer_ids: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        """Yields the answer to a line."""
        opened = self._opened
        text = f"{line}\n"
        if self._state is None:
            system = self._args.system
            ids = opened.encode(text if system is None else f"{system}\n\n{text}")
        else:
            ids = opened.encode_piece(text)
        tokens = start_stream(opened, ids, self._args, self._sampling, state=self._state)
        reply = Reply(tokens)
        self.answer_ids = reply.ids
        try:
            yield from reply.pieces(opened, self._stop, prompt=ids)
        finally:
            self._state = tokens.state

    def save(self, path: Path) -> None:
        _save(path, self._state, self._opened)

    def load(self, path: Path) -> None:
        self._state = _load(path, self._opened)


class _Snapshot(NamedTuple):
    """The tokens that a model has read, and its state after them."""

    ids: list[int]
    state: DecodingState


class TemplateConversation:
    """A conversation in the format of the tokenizer's chat template.

    The template renders the whole conversation again for each turn, but the model reads only the
    tokens after a known prefix. Two states are kept, before and after the last answer, because a
    template may render an answer differently from the tokens that were generated.
    """

    def __init__(self, opened: Opened, tokenizer: TextTokenizer, args: argparse.Namespace):
        self._opened, self._tokenizer, self._args = opened, tokenizer, args
        self._sampling = sampling_from_args(args, opened)
        self.reset()

    def reset(self) -> None:
        system = self._args.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._snapshots: list[_Snapshot] = []
        self.answer_ids: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        """Yields the answer to a line. If the template refuses the line, the conversation stays as
        it was."""
        opened = self._opened
        messages = [*self._messages, {"role": "user", "content": line}]
        ids = self._encode(messages)
        usable = [s for s in self._snapshots if _starts_with(ids, s.ids) and len(s.ids) < len(ids)]
        longest = max(usable, key=lambda snapshot: len(snapshot.ids), default=None)
        new_ids, state = (
            (ids, None) if longest is None else (ids[len(longest.ids) :], longest.state)
        )
        before = prefill(opened.model, new_ids, state=state, room=self._args.max_new_tokens)
        tokens = start_stream(opened, [], self._args, self._sampling, state=before)
        reply = Reply(tokens)
        self.answer_ids = reply.ids
        try:
            yield from reply.pieces(opened, self._args.stop, prompt=ids)
        finally:
            self._messages = [*messages, {"role": "assistant", "content": reply.text}]
            self._snapshots = [_Snapshot(ids, before), _Snapshot(ids + reply.ids, tokens.state)]

    def _encode(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        ids = self._tokenizer.encode_chat(messages)
        size = self._opened.model.vocab_size
        largest = max(ids, default=0)
        if largest >= size:  # Only a special token can lack a row; see `open_model`.
            names = {i: name for name, i in self._tokenizer.special_tokens.items()}
            raise ValueError(
                f"The chat template uses the special token {names.get(largest)!r} with id "
                f"{largest}, but the model has a vocabulary of {size} tokens. Use --plain to chat "
                "without the template, or --tokenizer to name the tokenizer that the model was "
                "trained with."
            )
        return ids

    def save(self, path: Path) -> None:
        _save(path, self._snapshots[-1].state if self._snapshots else None, self._opened)
        history = {"messages": self._messages, "tokens": self._snapshots[-1].ids}
        _history_path(path).write_text(json.dumps(history, ensure_ascii=False) + "\n", "utf-8")

    def load(self, path: Path) -> None:
        state = _load(path, self._opened)
        history_path = _history_path(path)
        if not history_path.exists():
            raise CheckpointError(
                f"There is no {history_path}, which /save writes beside the state, so the earlier "
                "messages are unknown. Restart with --plain to continue without them."
            )
        history = read_config(history_path, _MAX_HISTORY)
        match history:
            case {"messages": list(messages), "tokens": list(ids), **others} if not others:
                pass
            case _:
                raise _not_a_history(history_path)
        count = self._opened.model.vocab_size
        if not all(type(token) is int and 0 <= token < count for token in ids):
            raise _not_a_history(history_path)
        if len(ids) != int(state.position) + 1 or ids[-1] != int(state.token):
            raise CheckpointError(
                f"{history_path} has {len(ids)} tokens that are not those that the state {path} "
                "has read. Keep the two files of a /save together."
            )
        messages = [_message(history_path, message) for message in messages]
        # A template refuses some conversations, such as two answers in a row.
        self._encode([*messages, {"role": "user", "content": "?"}])
        self._messages = messages
        self._snapshots = [_Snapshot(ids, state)]


Conversation: TypeAlias = PlainConversation | TemplateConversation


def _message(path: Path, message: object) -> dict[str, str]:
    match message:
        case {"role": str(role), "content": str(content), **others} if not others:
            return {"role": role, "content": content}
        case _:
            raise _not_a_history(path)


def _not_a_history(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a file that /save writes beside a state. Load another one."
    )


def _starts_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return list(ids[: len(prefix)]) == list(prefix)


def _save(path: Path, state: DecodingState | None, opened: Opened) -> None:
    if state is None:
        raise ValueError("Nothing has been said yet, so there is no state to save.")
    save_state(path, state, opened.model)


def _load(path: Path, opened: Opened) -> DecodingState:
    state = load_state(path, opened.model)
    if state.token.ndim:
        raise CheckpointError(
            f"{path} must hold the state of one sequence, but has {state.token.shape[0]} rows. "
            "Load a file that /save has written."
        )
    return state


def _history_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
