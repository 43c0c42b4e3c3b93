"""Every file that the package reads, damaged at random: only documented errors come out.

A mutant is made from the name of its kind and its number, so `--mutants 7:8` runs number 7 again.
"""

import collections
import functools
import importlib.util
import os
import shutil
from pathlib import Path
from random import Random

import pytest

from tests.support import torch_files
from tests.support.fuzz_kinds import KINDS, Kind
from tests.support.mutants import Mutant, make_mutant, write_mutant
from tests.support.mutants._json import Pairs, dump, mutate_tree
from tests.support.watched import SlowError, watched


# Run-time type checks would raise errors that users do not see.
pytestmark = [
    pytest.mark.usefixtures("as_users_run"),
    pytest.mark.skipif(os.name == "nt", reason="needs named pipes and links"),
]

QUICK = 4
SLOW = {"lora", "lora of a hybrid"}  # left to CI

_SECRET = "the secret of another folder"


@functools.cache
def examples(kind: str, number: int, scratch: Path) -> dict[str, bytes]:
    """Returns the files of a valid example, after reading them once."""
    folder = scratch / f"example-{number}"
    folder.mkdir()
    KINDS[kind].examples[number](folder)
    KINDS[kind].read(folder)  # Also imports and compiles what is needed.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run(kind: str, number: int, scratch: Path) -> tuple[str, list[str]]:
    """Reads one mutant.

    **Returns:**

    What happened in a word, and the faults.
    """
    which = KINDS[kind]
    files = examples(kind, number % len(which.examples), scratch)
    mutant = make_mutant(f"{kind} {number}", files, which.targets, which.nodes)
    root = scratch / "root"
    folder, outside = root / f"mutant-{number}", root / "outside"
    shutil.rmtree(root, ignore_errors=True)
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text(_SECRET)
    write_mutant(mutant, folder, outside)
    before, others = _listing(folder), _listing(outside)
    outcome = "loaded"
    with watched(root, folder, may_write=which.may_write) as faults:
        try:
            which.read(folder)
        except which.errors as error:
            outcome = type(error).__name__
            faults += _message_faults(which, str(error), folder, mutant)
        except (Exception, SlowError) as error:
            outcome = f"{type(error).__name__} (unexpected)"
            faults.append(f"{type(error).__name__}: {str(error)[:300]}")
        except BaseException as error:
            # A panic of Rust code is no `Exception`, and its class cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            outcome = "PanicException (unexpected)"
            faults.append(f"PanicException: {str(error)[:300]}")
    if not which.may_write and _listing(folder) != before:
        faults.append("the folder was changed")
    if _listing(outside) != others or sorted(os.listdir(root)) != sorted([folder.name, "outside"]):
        faults.append("another folder was changed")
    return outcome, [f"mutant {number} ({', '.join(mutant.history)}): {text}" for text in faults]


def _message_faults(kind: Kind, message: str, folder: Path, mutant: Mutant) -> list[str]:
    names = [folder.name, *(Path(name).name for name in mutant.files)]
    faults: list[str] = []
    if kind.names_file and not any(name in message for name in names):
        faults.append(f"the message names no file: {message[:300]}")
    if _SECRET in message:
        faults.append(f"the message tells a secret: {message[:300]}")
    if not message.replace("\n", " ").isprintable() or len(message) > 3000:
        faults.append(f"the message is not fit to print: {message[:300]!a}")
    return faults


def _listing(folder: Path) -> list[tuple[str, int]]:
    return [(str(path), path.lstat().st_size) for path in sorted(folder.rglob("*"))]


def _numbers(option: str | None, default: int) -> range:
    first, _, last = (option or str(default)).rpartition(":")
    return range(int(first or 0), int(last))


def _check(kind: str, numbers: range, scratch: Path) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    for number in numbers:
        outcome, more = run(kind, number, scratch)
        outcomes[outcome] += 1
        faults += more
    print(f"{kind}: {len(numbers)} mutants, {dict(outcomes.most_common())}")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:40])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.safetensors", "a.bin", "a.npy", "a.xz"])
def test_mutates_what_is_damaged_already(name):
    """A mutant can have several mutations, and the tests must not fail in the second one."""
    json_with_infinity = b'{"a": 1e999, "b": [0.5, true, "x", 3]}'
    header = len(json_with_infinity).to_bytes(8, "little")
    archive = torch_files.zip_bytes([torch_files.Entry("archive/data.pkl", b"\x80\x02N.")])
    start = {"a.safetensors": header + json_with_infinity, "a.bin": archive}
    files = {name: start.get(name, json_with_infinity)}
    for number in range(600):
        mutant = make_mutant(f"{name} {number}", files, ["*"], ())
        content = mutant.files[name]
        assert isinstance(content, bytes)
        start_again = number % 6 == 5 or len(content) > 10_000
        files = {name: start.get(name, json_with_infinity) if start_again else content}


def test_mutated_trees_have_an_end():
    for seed in range(300):
        tree: object = Pairs([["a", Pairs([["b", [1, [2]]], ["c", Pairs([["d", 3]])]])]])
        for number in range(4):
            tree = mutate_tree(tree, Random(f"{seed} {number}"))
        assert len(dump(tree)) < 10**7  # A tree that contains itself is a RecursionError.


def test_few_mutants(tmp_path):
    """Those of the first example of each kind, if they need not compile much."""
    for kind in sorted(KINDS.keys() - SLOW):
        if not all(map(importlib.util.find_spec, KINDS[kind].needs)):
            continue
        scratch = tmp_path / kind
        scratch.mkdir()
        step = len(KINDS[kind].examples)
        _check(kind, range(0, QUICK * step, step), scratch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutants(kind, tmp_path, pytestconfig):
    for package in KINDS[kind].needs:
        pytest.importorskip(package)
    _check(kind, _numbers(pytestconfig.getoption("--mutants"), 200), tmp_path)
