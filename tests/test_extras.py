"""Without the packages of an extra, what needs them names the command that installs the extra."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]

# Extras of the tests, the website and the examples, and the format of files that JAX itself writes.
OTHERS = {"dev", "docs", "eval", "export", "parity", "test"}
# One process for all, because starting JAX takes longest.
CODE = """
import json, sys
for package in json.loads(sys.argv[1]):
    sys.modules[package] = None
import jax.random as jr
import mamba_eqx as mbx
from mamba_eqx import _cli, training

def serve():
    from mamba_eqx import serving

uses = {
    "serve": serve,
    "plot": lambda: training.plot_metrics("nowhere"),
    "testing": lambda: mbx.testing.check_laws(mbx.Mamba1(4, key=jr.key(0))),
    "text": lambda: mbx.TextTokenizer("{}"),
    "structured": lambda: mbx.generation.Grammar("start: 'a'", mbx.ByteTokenizer()),
    "completion": lambda: _cli._completion._script(_cli._parser(), "bash"),
}
found = {}
for extra, use in uses.items():
    try:
        use()
    except ImportError as error:
        found[extra] = str(error)
print(json.dumps(found))
"""


def test_missing_extras_are_named_with_their_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    used = {name: pins for name, pins in extras if name not in OTHERS}
    blocked = sorted({Requirement(pin).name for pins in used.values() for pin in pins})
    command = [sys.executable, "-c", CODE, json.dumps(blocked)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(result.stdout)
    assert found.keys() == used.keys()
    for extra, message in found.items():
        assert any(f"pip install {q}mamba_eqx[{extra}]{q}" in message for q in "'\"")
