"""The file of `compare.py`: every measurement, as JSON."""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple


FORMAT = 1

Record = dict[str, dict[str, Any]]
"""The records of works by name."""


def read_record(path: Path) -> Record:
    """Returns the works of a file."""
    values = json.loads(path.read_text("utf-8"))
    if values.get("format") != FORMAT:
        raise SystemExit(f"{path} has format {values.get('format')}, but {FORMAT} is needed.")
    return values["works"]


def write_record(works: Record, path: Path) -> None:
    """Writes a file, which at no moment is half written."""
    lines = ",\n".join(
        f'"{name}": {json.dumps(_rounded(work), separators=(",", ":"))}'
        for name, work in works.items()
    )
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f'{{"format": {FORMAT}, "works": {{\n{lines}\n}}}}\n', "utf-8")
    os.replace(temporary, path)


def merge(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """Returns a work with the contestants of two runs; of those in both, the later record.

    Everything else is that of the later run, and so are all contestants if the sizes or the
    processors differ.
    """
    sizes = ("model", "batch", "seq")
    if earlier is None or any(earlier[size] != later[size] for size in sizes):
        return later
    if processor(earlier) != processor(later):
        return later
    new = {name_of(record): record for record in later["contestants"]}
    contestants = [new.pop(name_of(record), record) for record in earlier["contestants"]]
    return later | {"contestants": [*contestants, *new.values()]}


def processor(work: dict[str, Any]) -> str:
    """Returns a description of the processor on which a work was measured."""
    facts = work["facts"]
    instructions = ", ".join(facts["instructions"]) or "unknown"
    return f"{facts['cpu']}, {facts['cores']} cores, instructions {instructions}"


def machines(works: Record) -> dict[str, str]:
    """Returns a letter for each processor on which works were measured, by its description."""
    found = dict.fromkeys(processor(work) for work in works.values())
    return {name: chr(ord("A") + i) for i, name in enumerate(found)}


def _rounded(value: Any) -> Any:
    """Rounds all numbers to five digits, a hundredth of the noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Speed(NamedTuple):
    """The speed of a contestant in tokens per second.

    **Fields:**

    - `median`: the median.
    - `low`, `high`: the 10th and 90th percentile of ten runs or more, else the extremes.
    - `runs`: the number of runs.
    """

    median: float
    low: float
    high: float
    runs: int


def speeds(work: dict[str, Any]) -> dict[str, Speed]:
    """Returns the speeds of all contestants that were timed, by name."""
    tokens = work["batch"] * work["seq"]
    return {
        name_of(record): _speed(tokens, record["seconds"])
        for record in work["contestants"]
        if "seconds" in record
    }


def name_of(record: dict[str, Any]) -> str:
    """Returns the name of a contestant."""
    return f"{record['library']}, {record['form']}"


def _speed(tokens: int, seconds: list[float]) -> Speed:
    rates = sorted(tokens / value for value in seconds)
    cut = math.floor(len(rates) / 10)
    return Speed(statistics.median(rates), rates[cut], rates[-1 - cut], len(rates))
