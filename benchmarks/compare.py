"""Compares mamba_eqx with other libraries, on the same weights and in turns.

    python benchmarks/compare.py [--work prefill decode-1 ...] [--json FILE] [--quick] [--no-peers]
    python benchmarks/compare.py --from FILE [--table] [--plot FILE.svg] [--write README.md ...]

Every contestant is a process of its own, which loads the same checkpoint. Its outputs are compared
with those of mamba_eqx in float32 before anything is timed. `--json` keeps every measurement, and
adds to a file that exists, so a long run can be cut into pieces. `--from` makes the tables and the
figure from such a file, and `--write` puts the tables into pages, between their markers.
"""

import argparse
import shlex
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from _contest import Contest
from _figure import plot
from _machine import facts
from _record import merge, read_record, write_record
from _report import print_report, write_tables
from _works import ENTRIES, OURS, REFERENCE, WORKS, Entry, build, operations, select

import mamba_eqx as mbx


def main() -> None:
    args = _arguments()
    record = measure(args) if args.source is None else read_record(args.source)
    if args.source is None or args.table:
        print_report(record, quick=args.quick)
    if args.plot is not None:
        plot(record, args.plot)
    for path in args.write:
        write_tables(record, path)


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Measures the selected works one model after another, and returns all records by work.

    With `--json`, the file is written after each work. Its other works are kept, and so are the
    contestants of the same work that were not measured again.
    """
    record = read_record(args.json) if args.json is not None and args.json.exists() else {}
    found = {}
    works = select(args.work, quick=args.quick)
    machine: dict[str, object] = {}
    with Contest(_entries(args), dict(args.python)) as contest:
        for name, group in groupby(works, key=lambda work: work.model):
            same_model = list(group)
            with tempfile.TemporaryDirectory() as folder:
                model = build(name)
                mbx.save_pretrained(model, folder)
                vocab_size, count = model.vocab_size, operations(model)
                del model
                contest.open(Path(folder), same_model)
            for work in same_model:
                contestants = contest.prepare(work, work.inputs(vocab_size))
                if args.pause:
                    print(f"{work.name} is ready to be timed.", file=sys.stderr, flush=True)
                    input()
                machine = machine or facts(quick=args.quick)
                contest.measure(seconds=0.1 if args.quick else args.seconds)
                measured = {
                    "title": work.title,
                    "model": work.model,
                    "kind": work.kind,
                    "batch": work.batch,
                    "seq": work.seq,
                    "operations": count,
                    "command": _command(work.name, args),
                    "facts": machine,
                    "contestants": contestants,
                }
                found[work.name] = record[work.name] = merge(record.get(work.name), measured)
                record = {name: record[name] for name in WORKS if name in record}
                if args.json is not None:
                    write_record(record, args.json)
        if contest.failures:
            print("\n".join(contest.failures), file=sys.stderr)
    return found if args.json is None else record


def _command(work: str, args: argparse.Namespace) -> str:
    """Returns the command that repeats a work, without the paths of this machine."""
    only = ["--only", *args.only] if args.only else []
    own = ["--no-peers"] if args.no_peers else []
    seconds = f"{args.seconds:g}"
    return shlex.join(
        ["python", "benchmarks/compare.py", "--work", work, "--seconds", seconds, *only, *own]
    )


def _entries(args: argparse.Namespace) -> tuple[Entry, ...]:
    chosen = [
        entry
        for entry in ENTRIES
        if (entry.library == OURS or not args.no_peers)
        and (not args.only or any(entry.name.startswith(name) for name in args.only))
    ]
    return (REFERENCE, *(entry for entry in chosen if entry != REFERENCE))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", nargs="+", default=[], help=f"names, or how they start: {', '.join(WORKS)}")
    add("--only", nargs="+", default=[], help='contestants, or how they start: "llama.cpp, Q8_0"')
    add("--no-peers", action="store_true", help="measure mamba_eqx only")
    add("--seconds", type=float, default=60.0, help="time for each work, warm-up excluded")
    add("--pause", action="store_true", help="wait for a line of input before timing each work")
    add("--quick", action="store_true", help="tiny sizes, to check that the script runs")
    add("--json", type=Path, help="file to add all measurements to")
    add("--python", nargs="+", type=_python, default=[], metavar="LIBRARY=PATH")
    add("--from", dest="source", type=Path, help="make tables and figure from this file")
    add("--table", action="store_true", help="with --from: print the report")
    add("--plot", type=Path, help="file for the figure, an SVG")
    add("--write", nargs="+", type=Path, default=[], help="pages whose tables are made again")
    return parser.parse_args()


def _python(text: str) -> tuple[str, str]:
    library, separator, path = text.partition("=")
    if not separator or library not in {entry.library for entry in ENTRIES}:
        raise argparse.ArgumentTypeError(f"{text!r} must be LIBRARY=PATH")
    return library, path


if __name__ == "__main__":
    main()
