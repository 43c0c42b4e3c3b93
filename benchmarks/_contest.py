"""Runs contestants in processes of their own, which take turns, and compares what they compute."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from _common import cores
from _works import REFERENCE, Entry, Work


HERE = Path(__file__).parent
MOST_RUNS = 100


class Process:
    """A contestant's process: one request, one reply."""

    def __init__(self, entry: Entry, python: str):
        self.entry = entry
        self.opened: dict[str, Any] = {}
        self._errors: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", f"contestants.{entry.module}"],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, verb: str, **options: object) -> dict[str, Any]:
        """Sends a request and returns the reply.

        A reply of `{"skipped": REASON}` means that the contestant cannot do it.

        **Raises:** a `RuntimeError` with the contestant's own words if it failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({verb: options}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip()
            last = words.rpartition("\n")[2]
            if last.startswith("ModuleNotFoundError: "):
                return {"skipped": last.partition(": ")[2]}
            raise RuntimeError(f"{self.entry.name} ended:\n{words}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.entry.name} failed:\n{reply['error']}")
        return reply

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It ended before it read a request.
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


class Contest:
    """The processes of all contestants, and the model that they have open.

    **Arguments:**

    - `entries`: the contestants; the first one is what the others are compared with.
    - `pythons`: the Python of contestants by their library, where it is not the one that runs now.
    """

    def __init__(self, entries: tuple[Entry, ...], pythons: Mapping[str, str]):
        assert entries[0] == REFERENCE
        self.failures: list[str] = []
        self._entries = entries
        self._pythons = pythons
        self._processes: dict[str, Process] = {}
        self._skipped: dict[str, str] = {}
        self._ready: list[tuple[Process, dict[str, Any]]] = []

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.close()

    def open(self, folder: Path, works: list[Work]) -> None:
        """Lets each contestant load the checkpoint in `folder` for the given works.

        One that fails is skipped in them; `failures` says why.

        **Raises:** a `RuntimeError` if the reference fails.
        """
        kinds = {work.kind for work in works}
        self._skipped = {}
        for entry in self._entries:
            if not kinds.intersection(entry.kinds):
                continue
            process = self._processes.get(entry.name)
            if process is None:
                python = self._pythons.get(entry.library, sys.executable)
                process = self._processes[entry.name] = Process(entry, python)
            try:
                process.opened = process.ask(
                    "open", folder=str(folder), form=entry.form, threads=cores()
                )
            except RuntimeError as failure:
                process.opened = {"skipped": self._failed(entry, works[0].model, failure)}
            if "skipped" in process.opened:
                self._drop(entry, process.opened["skipped"])
            _say(f"{entry.name}: {process.opened.get('skipped', 'loaded')}")

    def prepare(self, work: Work, tokens: np.ndarray) -> list[dict[str, Any]]:
        """Lets all contestants do the work once, and compares their outputs.

        A contestant that fails, or whose output differs by more than its bound, is not timed. Its
        record and `failures` say why.

        **Returns:** a record for each contestant, to which `measure` adds times.

        **Raises:** a `RuntimeError` if the reference fails.
        """
        records: list[dict[str, Any]] = []
        self._ready = []
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "reference.npz"
            given, check = Path(folder) / "tokens.npy", Path(folder) / "check.npy"
            np.save(given, tokens)
            np.save(check, np.resize(tokens, 32))
            for entry in self._entries:
                if work.kind not in entry.kinds:
                    continue
                record: dict[str, Any] = {"library": entry.library, "form": entry.form}
                records.append(record)
                process = self._processes.get(entry.name)
                if process is None:
                    record["skipped"] = self._skipped[entry.name]
                    continue
                output = reference if entry == REFERENCE else Path(folder) / "output.npz"
                try:
                    reply = process.ask(
                        "prepare",
                        kind=work.kind,
                        tokens=str(given),
                        check=str(check),
                        output=str(output),
                        all_logits=work.all_logits,
                        new=work.seq,
                    )
                    if "skipped" not in reply:
                        record |= process.opened | compare(entry, output, reference)
                except RuntimeError as failure:
                    reply = {"skipped": self._failed(entry, work.name, failure)}
                    if process.ended:
                        self._drop(entry, reply["skipped"])
                if "skipped" in reply:
                    record["skipped"] = reply["skipped"]
                    continue
                record |= reply | {"bound": entry.bound, "seconds": []}
                _say(f"{work.name}: {entry.name} agrees within {record['error']:.1g}")
                self._ready.append((process, record))
        return records

    def measure(self, *, seconds: float) -> None:
        """Times the work that was prepared, in turns, and adds the times to the records.

        Each contestant gets an equal share of `seconds`, and is called until its share is spent, at
        least once and at most a hundred times. Whoever begins a round begins the next one last.
        One that fails gets no times; its record and `failures` say why.

        **Raises:** a `RuntimeError` if the reference fails.
        """
        share = seconds / len(self._ready)
        for turn in range(MOST_RUNS):
            first = turn % len(self._ready)
            for process, record in self._ready[first:] + self._ready[:first]:
                if sum(record["seconds"]) >= share:
                    continue
                time.sleep(0.02)  # The threads of the previous contestant go to sleep.
                try:
                    record["seconds"].append(process.ask("run")["seconds"])
                except RuntimeError as failure:
                    record["skipped"] = self._failed(process.entry, "run", failure)
                    del record["seconds"]
                    self._ready = [one for one in self._ready if one[0] is not process]
                    self._drop(process.entry, record["skipped"])

    def _failed(self, entry: Entry, where: str, failure: RuntimeError) -> str:
        """Notes a failure, and returns its last line, the reason; raises that of the reference."""
        if entry == REFERENCE:
            raise failure
        self.failures.append(f"{where}: {failure}")
        return str(failure).splitlines()[-1]

    def _drop(self, entry: Entry, reason: str) -> None:
        """Ends the process of a contestant, which is skipped until the next model is opened."""
        self._skipped[entry.name] = reason
        self._processes.pop(entry.name).close()


def compare(entry: Entry, output: Path, reference: Path) -> dict[str, float]:
    """Returns how much the outputs of a contestant differ from the reference.

    **Returns:** `error`, the largest difference relative to the largest output of the reference,
    and for decoding `same_tokens`, the share of equal tokens.

    **Raises:** a `RuntimeError` if an error exceeds the bound of `entry`, or if a contestant whose
    weights are those of the reference decodes other tokens.
    """
    found, wanted = np.load(output), np.load(reference)
    result = {"error": 0.0}
    for name in wanted.files:
        theirs, ours = found[name], wanted[name]
        if name == "tokens":
            same = result["same_tokens"] = float(np.mean(theirs == ours))
            if same < 1 and entry.bound == REFERENCE.bound:
                raise RuntimeError(f"{1 - same:.0%} of the tokens of {entry.name} differ.")
            continue
        error = float(np.max(np.abs(theirs - ours)) / np.max(np.abs(ours)))
        if not error <= entry.bound:
            raise RuntimeError(
                f"The {name} of {entry.name} differs from that of {REFERENCE.name} by {error:.2g}"
                f" (relative), which exceeds {entry.bound:g}."
            )
        result["error"] = max(result["error"], error)
    return result


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
