"""The tables of `compare.py`, made from the records of works."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import print_verdict, shown, table
from _record import Record, Speed, machines, name_of, processor, speeds
from _works import OURS, REFERENCE, WANTED


# Forms of ours whose weights have about as many bits as those of a peer.
_LIKE = {"Q8_0": "8 bits", "Q4_0": "4 bits"}

_MARK = re.compile(r"(<!-- compare: (\w+) -->\n).*?(<!-- compare: end -->)", re.DOTALL)

Cell = Callable[[dict[str, Any], dict[str, Any]], str | None]
"""What a table shows for a work and a contestant's record in it."""


def print_report(record: Record, *, quick: bool) -> None:
    """Prints all tables of a record, and whether the project's requirements are met."""
    print(f"## Comparison{' (quick: tiny sizes, numbers mean nothing)' if quick else ''}\n")
    print("\n".join(section(record) for section in _SECTIONS.values()))
    if quick:
        return
    for work_name, wanted in WANTED.items():
        if work_name not in record:
            continue
        found = speeds(record[work_name])
        for library, least in wanted.items():
            theirs = found.get(f"{library}, float32")
            ratio = None if theirs is None else found[REFERENCE.name].median / theirs.median
            print_verdict(f"{work_name}: times the speed of {library}", ratio, least)


def write_tables(record: Record, path: Path) -> None:
    """Replaces each part of a page between `<!-- compare: NAME -->` and `<!-- compare: end -->`.

    **Raises:** a `SystemExit` if the page has no such part, or one of an unknown name.
    """

    def made(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in _SECTIONS:
            raise SystemExit(f"{path}: the sections are {', '.join(_SECTIONS)}, not {name!r}.")
        return f"{begin}\n{_SECTIONS[name](record)}\n{end}"

    text, count = _MARK.subn(made, path.read_text("utf-8"))
    if not count:
        raise SystemExit(f"{path} has no `<!-- compare: NAME -->`.")
    path.write_text(text, "utf-8")


# --- Where we win, and where we lose ---


def summary(record: Record) -> str:
    """Returns the table that says, for each work, against whom mamba_eqx wins and loses."""
    rows = []
    letters = machines(record)
    for work in record.values():
        found = speeds(work)
        ours = {name.partition(", ")[2]: s for name, s in found.items() if name.startswith(OURS)}
        win, equal, lose = [], [], []
        for contestant in work["contestants"]:
            name = name_of(contestant)
            if contestant["library"] == OURS or name not in found:
                continue
            mine = _like(ours, contestant["form"])
            theirs = found[name]
            label = _short(contestant)
            if mine.low <= theirs.high and theirs.low <= mine.high:
                equal.append(label)
            elif mine.median > theirs.median:
                win.append((mine.median / theirs.median, label))
            else:
                lose.append((theirs.median / mine.median, label))
        rows.append(
            (
                work["title"] + _on(letters, work),
                shown(ours["float32"].median),
                _times(win),
                ", ".join(equal),
                _times(lose),
            )
        )
    header = ("", f"{OURS}, tokens/s", "faster than", "equal to", "slower than")
    return (
        "Each number says how many times as fast the faster one is. Weights of a peer are\n"
        "compared with ours of as many bits (float32, bfloat16, 8, 4), or with our fastest where\n"
        "ours of that size were not measured. Speeds whose spreads overlap are called equal.\n\n"
        + table(header, rows)
    )


def _like(ours: dict[str, Speed], form: str) -> Speed:
    form = _LIKE.get(form, form)
    plain = {name: speed for name, speed in ours.items() if "," not in name}
    return plain.get(form) or max(plain.values(), key=lambda speed: speed.median)


def _times(found: list[tuple[float, str]]) -> str:
    return ", ".join(f"{name} {shown(ratio)}×" for ratio, name in sorted(found, reverse=True))


def _short(contestant: dict[str, Any]) -> str:
    form = "" if contestant["form"] == "float32" else f" {contestant['form']}"
    return contestant["library"] + form


# --- The machine ---


def machine(record: Record) -> str:
    """Returns a paragraph for each processor, about its limits and the versions."""
    letters = machines(record)
    return ">\n".join(
        _described(
            name if len(letters) == 1 else f"Machine {letter}: {name}",
            [work for work in record.values() if processor(work) == name],
        )
        for name, letter in letters.items()
    )


def _described(name: str, works: Sequence[dict[str, Any]]) -> str:
    facts = [work["facts"] for work in works]
    versions: dict[str, str] = {}
    for work in works:
        for contestant in work["contestants"]:
            versions |= contestant.get("versions", {})
    speed = {
        name: _range([fact[name] / 1e9 for fact in facts])
        for name in ("memory", "float32", "bfloat16", "int8", "exponentials")
    }
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"> {_span([fact['date'] for fact in facts])}; {libraries}, Python {facts[0]['python']}.\n"
        f"> {name}. Measured in the same runs, through XLA: memory is read at"
        f" {speed['memory']} GB/s; products of matrices run at {speed['float32']} GFLOP/s in"
        f" float32, {speed['bfloat16']} in bfloat16, {speed['int8']} in int8;"
        f" {speed['exponentials']} billion exponentials per second.\n"
    )


def _on(letters: Mapping[str, str], work: dict[str, Any]) -> str:
    """Returns what a title says about the machine of a work, if there are several."""
    return "" if len(letters) == 1 else f" (machine {letters[processor(work)]})"


def _range(values: Sequence[float]) -> str:
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def _span(dates: Sequence[str]) -> str:
    first, last = min(dates)[:10], max(dates)[:10]
    return first if first == last else f"{first} to {last}"


# --- All measurements ---


def tables(record: Record) -> str:
    """Returns the tables of all contestants: speeds, shares of the limits, and differences."""
    parts = []
    for title, works in _groups(record):
        parts += [
            f"{title}, tokens per second: the median, and in brackets the 10th and the 90th"
            " percentile of ten runs or more, or the extremes of fewer:\n",
            _grid(works, _speed),
            f"{title}, share of the machine's limit, which is reading the weights for each step of"
            " decoding, and float32 products with weights otherwise:\n",
            _grid(works, _share),
        ]
        if works[0]["kind"] == "train":
            parts += [f"{title}, temporary memory in MiB:\n", _grid(works, _memory)]
    parts += [
        "The largest difference of any output from mamba_eqx in float32, relative to the largest"
        " output (logits; the loss and the gradient of the embedding), what was allowed, and the"
        " smallest share of equal tokens in decoding:\n",
        _differences(record),
    ]
    skipped = _skipped(record)
    if skipped:
        parts += ["Not measured:\n", skipped]
    return "\n".join(parts)


def _groups(record: Record) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    letters = machines(record)
    for work in record.values():
        title = f"{work['model']}, {_KINDS[work['kind']]}{_on(letters, work)}"
        groups.setdefault(title, []).append(work)
    return groups.items()


_KINDS = {"prefill": "prefill", "decode": "decoding", "train": "training step"}


def _grid(works: list[dict[str, Any]], cell: Cell) -> str:
    """Returns a table with a row for each contestant that was timed, and a column for each work."""
    names = dict.fromkeys(name for work in works for name in speeds(work))
    rows = []
    for name in names:
        found = [_find(work, name) for work in works]
        cells = [
            None if contestant is None else cell(work, contestant)
            for work, contestant in zip(works, found, strict=True)
        ]
        rows.append((name, *cells))
    columns = (work["title"].removeprefix("decoding, ").removeprefix("prefill, ") for work in works)
    return table(("", *columns), rows)


def _find(work: dict[str, Any], name: str) -> dict[str, Any] | None:
    found = (c for c in work["contestants"] if name_of(c) == name and "seconds" in c)
    return next(found, None)


def _speed(work: dict[str, Any], contestant: dict[str, Any]) -> str:
    found = speeds(work)[name_of(contestant)]
    if found.runs == 1:
        return f"{shown(found.median)} (one run)"
    return f"{shown(found.median)} ({shown(found.low)} to {shown(found.high)})"


def _share(work: dict[str, Any], contestant: dict[str, Any]) -> str:
    rate = speeds(work)[name_of(contestant)].median
    if work["kind"] == "decode":
        share = rate / work["batch"] * contestant["weight_bytes"] / work["facts"]["memory"]
    else:
        passes = 3 if work["kind"] == "train" else 1
        share = rate * passes * work["operations"] / work["facts"]["float32"]
    return f"{share:.0%}"


def _memory(_: dict[str, Any], contestant: dict[str, Any]) -> str | None:
    memory = contestant["memory"]
    return None if memory is None else shown(float(memory))


def _differences(record: Record) -> str:
    worst: dict[str, list[float]] = {}
    for work in record.values():
        for contestant in work["contestants"]:
            if "error" not in contestant:
                continue
            found = worst.setdefault(name_of(contestant), [0.0, contestant["bound"], 1.0])
            found[0] = max(found[0], contestant["error"])
            found[2] = min(found[2], contestant.get("same_tokens", 1.0))
    return table(
        ("", "difference", "allowed", "equal tokens"),
        (
            (name, f"{error:.1g}", bound, f"{same:.0%}")
            for name, (error, bound, same) in worst.items()
        ),
    )


def _skipped(record: Record) -> str:
    reasons: dict[str, list[str]] = {}
    for work in record.values():
        for contestant in work["contestants"]:
            if "skipped" in contestant:
                what = f"{name_of(contestant)}: {contestant['skipped']}"
                reasons.setdefault(what, []).append(work["title"])
    return "".join(f"- {reason} ({'; '.join(works)})\n" for reason, works in reasons.items())


_SECTIONS: dict[str, Callable[[Record], str]] = {
    "summary": summary,
    "machine": machine,
    "tables": tables,
}
