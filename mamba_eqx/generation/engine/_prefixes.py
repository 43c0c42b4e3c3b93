"""The prefix cache: states after earlier texts, from which texts with the same beginning start."""

from collections import OrderedDict

import jax
import numpy as np

from .._state import DecodingState


class Prefixes:
    """States by the tokens that they have read. The least recently used states are dropped first.

    A recurrent state cannot be shortened, so that a state serves only texts that begin with all of
    its tokens.
    """

    def __init__(self, max_bytes: int):
        """**Arguments:**

        - `max_bytes`: the maximum size of all states together. 0 keeps none.
        """
        self._max_bytes = max_bytes
        self._states: OrderedDict[bytes, DecodingState] = OrderedDict()
        self._lengths: dict[int, int] = {}  # how many entries have this number of bytes in the key
        self.bytes = 0

    @property
    def enabled(self) -> bool:
        """Whether any state can be kept."""
        return self._max_bytes > 0

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, tokens: np.ndarray) -> tuple[int, DecodingState | None]:
        """Returns the state that has read the most of the first tokens, and their number."""
        key = tokens.astype(np.int32).tobytes()
        for length in sorted(self._lengths, reverse=True):
            if length <= len(key) and key[:length] in self._states:
                self._states.move_to_end(key[:length])
                return length // 4, self._states[key[:length]]
        return 0, None

    def get(self, tokens: np.ndarray) -> DecodingState | None:
        """Returns the state that has read exactly `tokens`. This is no use that keeps it longer."""
        return self._states.get(tokens.astype(np.int32).tobytes())

    def add(self, tokens: np.ndarray, state: DecodingState) -> None:
        """Keeps a state that has read exactly `tokens`, the last of which is `state.token`."""
        key = tokens.astype(np.int32).tobytes()
        size = _size(key, state)
        if size > self._max_bytes:
            return
        self._drop(key)
        self._states[key] = state
        self._lengths[len(key)] = self._lengths.get(len(key), 0) + 1
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._states)))

    def _drop(self, key: bytes) -> None:
        state = self._states.pop(key, None)
        if state is None:
            return
        self.bytes -= _size(key, state)
        self._lengths[len(key)] -= 1
        if not self._lengths[len(key)]:
            del self._lengths[len(key)]


def _size(key: bytes, state: DecodingState) -> int:
    return len(key) + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
