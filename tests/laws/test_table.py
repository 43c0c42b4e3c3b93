"""The table of laws in the docs matches the tests of this folder."""

import re
from pathlib import Path

import mamba_eqx as mbx


FOLDER = Path(__file__).parent


def test_docs_list_every_law():
    """The table of laws in the docs and the tests here match, and the class docstring of the
    protocol names a selection of these laws."""
    page = (FOLDER.parents[1] / "docs/api/protocol.md").read_text()
    table = page.partition("| law | statement |")[2].partition("\n\n")[0]
    laws = re.findall(r"^\| ([a-z]+) \|", table, flags=re.MULTILINE)
    files = [path for path in FOLDER.glob("test_*.py") if path != Path(__file__)]
    code = "".join(path.read_text() for path in files)
    tests = set(re.findall(r"^def test_(\w+)", code, flags=re.MULTILINE))
    assert {test.split("_")[0] for test in tests} == set(laws)
    assert set(laws) <= tests
    summary = re.findall(r"- \*([a-z]+)\*:", str(mbx.AbstractSequenceLayer.__doc__))
    assert set(summary) <= set(laws)
    assert set(mbx.testing.LAWS) == set(laws) - {"stack", "config", "export", "sharding"}
