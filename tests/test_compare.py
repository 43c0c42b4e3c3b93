"""The parts of `benchmarks/compare.py` that measure nothing: file, tables, figure, comparison."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")


@pytest.fixture(autouse=True)
def _import_from_benchmarks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def _contestant(library: str, form: str, seconds: list[float], **others: object) -> dict[str, Any]:
    return {
        "library": library,
        "form": form,
        "seconds": seconds,
        "error": 1e-5,
        "bound": 1e-3,
        "weight_bytes": 1000,
        "memory": None,
        "versions": {library: "1.0"},
        **others,
    }


def _record() -> dict[str, dict[str, Any]]:
    facts = {
        "date": "2026-11-30 00:00 UTC",
        "cpu": "a processor",
        "cores": 2,
        "instructions": ["avx2"],
        "python": "3.11.7",
        "memory": 1e6,
        **dict.fromkeys(("float32", "bfloat16", "int8", "exponentials"), 1e9),
    }
    contestants = [
        _contestant("mamba_eqx", "float32", [1.0, 1.1, 0.9], same_tokens=1.0),
        _contestant("mamba_eqx", "8 bits", [0.5]),
        _contestant("transformers", "float32", [4.0]),
        _contestant("mamba.py", "float32", [1.0, 1.2]),
        _contestant("llama.cpp", "Q8_0", [0.25] * 20, bound=0.1),
        {"library": "llama.cpp", "form": "Q4_0", "skipped": "No module named 'llama_cpp'"},
    ]
    work = {
        "title": "decoding, 1 sequence",
        "model": "mamba-130m",
        "kind": "decode",
        "batch": 1,
        "seq": 8,
        "operations": 10,
        "command": "python benchmarks/compare.py",
        "facts": facts,
        "contestants": contestants,
    }
    return {"decode-1": work}


def test_record_file_round_trips(tmp_path: Path):
    record = importlib.import_module("_record")
    path = tmp_path / "compare.json"
    record.write_record(_record(), path)
    assert record.read_record(path) == _record()
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(SystemExit, match="has format 0, but 1 is needed"):
        record.read_record(path)


def test_spread_leaves_out_a_tenth_at_each_end():
    speeds = importlib.import_module("_record").speeds
    work = _record()["decode-1"]
    work["contestants"] = [_contestant("mamba_eqx", "float32", [8 / rate for rate in range(1, 21)])]
    speed = speeds(work)["mamba_eqx, float32"]
    assert tuple(np.round(speed, 6)) == (10.5, 3, 18, 20)


def test_summary_says_who_is_faster():
    rows = importlib.import_module("_report").summary(_record()).splitlines()
    # 8 bits of a peer are compared with 8 bits of ours, and spreads that overlap are equal.
    wanted = "| decoding, 1 sequence | 8 | transformers 4× | mamba.py | llama.cpp Q8_0 2× |"
    assert rows[-1] == wanted


def test_tables_show_every_contestant():
    text = importlib.import_module("_report").tables(_record())
    assert "| mamba_eqx, float32 | 8 (7.27 to 8.89) |" in text
    assert "| transformers, float32 | 2 (one run) |" in text
    assert "| llama.cpp, Q8_0 | 3% |" in text  # 32 tokens/s of 1000 bytes, of 1 MB/s
    assert "- llama.cpp, Q4_0: No module named 'llama_cpp' (decoding, 1 sequence)" in text


def test_tables_are_written_between_marks(tmp_path: Path):
    report = importlib.import_module("_report")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compare: machine -->\nold\n<!-- compare: end -->\nafter\n")
    report.write_tables(_record(), page)
    begin, _, rest = page.read_text().partition("<!-- compare: machine -->\n")
    assert begin == "before\n"
    assert rest == f"\n{report.machine(_record())}\n<!-- compare: end -->\nafter\n"
    page.write_text("<!-- compare: other -->\n<!-- compare: end -->\n")
    with pytest.raises(SystemExit, match="not 'other'"):
        report.write_tables(_record(), page)
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no"):
        report.write_tables(_record(), page)


def test_figure_is_an_image_for_light_and_dark_pages(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "compare.svg"
    importlib.import_module("_figure").plot(_record(), path)
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text
    for words in ("decoding, 1 sequence", "transformers", "8 bits"):
        assert words in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_measurements(page: Path, tmp_path: Path):
    read_record = importlib.import_module("_record").read_record
    copy = tmp_path / page.name
    copy.write_text(page.read_text("utf-8"), "utf-8")
    write_tables = importlib.import_module("_report").write_tables
    write_tables(read_record(ROOT / "docs" / "compare.json"), copy)
    assert copy.read_text("utf-8") == page.read_text("utf-8"), (
        "python benchmarks/compare.py --from docs/compare.json --plot docs/compare.svg "
        "--write docs/speed.md README.md"
    )


def test_outputs_that_differ_are_refused(tmp_path: Path):
    contest, works = importlib.import_module("_contest"), importlib.import_module("_works")
    reference, output = tmp_path / "reference.npz", tmp_path / "output.npz"
    exact, narrow = (
        next(entry for entry in works.ENTRIES if entry.name == name)
        for name in ("transformers, float32", "llama.cpp, Q8_0")
    )
    logits, tokens = np.array([1.0, -2.0, 0.5]), np.array([3, 4])
    np.savez(reference, logits=logits, tokens=tokens)
    np.savez(output, logits=logits + 0.02, tokens=np.array([3, 5]))
    assert contest.compare(narrow, output, reference) == {
        "error": pytest.approx(0.01),
        "same_tokens": 0.5,
    }
    with pytest.raises(RuntimeError, match=r"logits of transformers, float32 differs .* by 0\.01"):
        contest.compare(exact, output, reference)
    np.savez(output, logits=logits, tokens=np.array([3, 5]))
    with pytest.raises(RuntimeError, match="50% of the tokens of transformers, float32 differ"):
        contest.compare(exact, output, reference)
    np.savez(output, logits=logits * np.nan, tokens=tokens)
    with pytest.raises(RuntimeError, match="by nan"):
        contest.compare(narrow, output, reference)


def test_runs_of_one_work_are_merged_by_contestant():
    merge = importlib.import_module("_record").merge
    earlier = _record()["decode-1"]
    again, new = _contestant("mamba_eqx", "8 bits", [0.4]), _contestant("mamba.py", "remat", [2.0])
    later = earlier | {"command": "later", "contestants": [again, new]}
    kept = earlier["contestants"]
    assert merge(earlier, later) == later | {"contestants": [kept[0], again, *kept[2:], new]}
    assert merge(None, later) == later
    longer = later | {"seq": 16}
    assert merge(earlier, longer) == longer


def test_command_names_all_options(monkeypatch: pytest.MonkeyPatch):
    compare = importlib.import_module("compare")
    words = ["--seconds", "5", "--only", "llama.cpp, Q8_0", "--no-peers"]
    monkeypatch.setattr("sys.argv", ["compare.py", *words])
    command = compare._command("decode-1", compare._arguments())
    assert shlex.split(command)[2:] == ["--work", "decode-1", *words]


class _Fails:
    """A process of a contestant that fails at one request."""

    ended = True

    def __init__(self, entry: Any, at: str, closed: list[str]):
        self.entry, self._at, self._closed = entry, at, closed
        self.opened: dict[str, Any] = {}

    def ask(self, verb: str, **options: Any) -> dict[str, Any]:
        if verb == self._at:
            raise RuntimeError(f"{self.entry.name} ended:\nout of memory")
        if verb == "prepare":
            np.savez(options["output"], logits=np.ones(2))
        return {"seconds": 0.05} if verb == "run" else {}

    def close(self) -> None:
        self._closed.append(self.entry.name)


@pytest.mark.parametrize("at", ["open", "prepare", "run"])
def test_failure_of_one_contestant_does_not_end_the_others(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    contest, works = importlib.import_module("_contest"), importlib.import_module("_works")
    ours, theirs = works.REFERENCE, works.ENTRIES[1]
    closed: list[str] = []
    monkeypatch.setattr(
        contest, "Process", lambda entry, _: _Fails(entry, at if entry == theirs else "", closed)
    )
    work = works.select(["decode-1"], quick=True)[0]
    with contest.Contest((ours, theirs), {}) as race:
        race.open(tmp_path, [work])
        records = race.prepare(work, np.arange(4))
        race.measure(seconds=0.2)
        assert closed == [theirs.name]
        assert "out of memory" in race.failures[0]
        assert race.prepare(work, np.arange(4))[1]["skipped"] == "out of memory"
    assert sum(records[0]["seconds"]) > 0
    assert records[1]["skipped"] == "out of memory"
    assert "seconds" not in records[1]
    assert closed == [theirs.name, ours.name]


def test_works_are_selected_by_name_or_start():
    works = importlib.import_module("_works")
    names = [work.name for work in works.select(["decode", "train-768"], quick=False)]
    assert names == ["decode-1", "decode-8", "train-768"]
    with pytest.raises(SystemExit, match="There is no work 'sing'"):
        works.select(["sing"], quick=False)
    assert set(works.WANTED) <= set(works.WORKS)
