"""Code of users under pyright's strict mode."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


# The block of the README, with types for the argument and the result.
CODE = """
import equinox as eqx
import jax
import jax.random as jr
import mamba_eqx as mbx


class Classifier(eqx.Module):
    block: mbx.Block
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.block(x).mean(axis=0))


def run(layer: mbx.AbstractSequenceLayer, x: jax.Array) -> jax.Array:
    return layer(x)


keys = jr.split(jr.key(0), 2)
block = mbx.Block(mbx.Mamba1(32, key=keys[0]))
model = Classifier(block, eqx.nn.Linear(32, 10, key=keys[1]))
logits = run(model.block, jax.numpy.zeros((3, 32)))
state: mbx.Mamba1State = block.init_state()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_generic_layers_need_no_type_argument(tmp_path: Path):
    (tmp_path / "user.py").write_text(CODE)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(Path(__file__).parents[2])]})
    )
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    messages = [found["message"] for found in json.loads(result.stdout)["generalDiagnostics"]]
    # Types that are unknown in JAX or Equinox are not ours.
    assert [m for m in messages if "type argument" in m or "mamba_eqx" in m] == []
