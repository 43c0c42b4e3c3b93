"""The collectives of a compiled program, read from its text."""

import math
import re
from typing import NamedTuple


KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f64": 8}


class Collective(NamedTuple):
    kind: str
    bytes: int
    """The bytes of its result."""
    loops: int
    """In how many nested loops it runs."""


def collectives(text: str) -> list[Collective]:
    """Reads all collectives of an optimised program (`compiled.as_text()`)."""
    found: list[tuple[str, str, int]] = []
    callers: dict[str, tuple[str, bool]] = {}
    computation = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = start[1]
        for name in re.findall(
            r"(?:calls|to_apply|body|condition|computations)=\{?%?([\w.\-]+)", line
        ):
            callers[name] = computation, f"body=%{name}" in line or f"body={name}" in line
        if op := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", op[1])
            size = sum(
                _BYTES[d] * math.prod(map(int, filter(None, n.split(",")))) for d, n in shapes
            )
            found.append((computation, op[2], size))

    def loops(computation: str) -> int:
        if computation not in callers:
            return 0
        caller, is_loop = callers[computation]
        return loops(caller) + is_loop

    return [Collective(kind, size, loops(computation)) for computation, kind, size in found]
