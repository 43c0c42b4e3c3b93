from collections.abc import Iterator, Sequence


def until(stops: Sequence[str], pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a text up to where one of `stops` begins in it, the first to be complete. What
    may turn out to be the beginning of one is held back until it is known not to be."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, at = min(found)
            yield held[:at]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How long the longest beginning of `stop` is with which `text` ends."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
