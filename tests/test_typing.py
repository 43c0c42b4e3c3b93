"""Code of users under pyright's strict mode, in a project of their own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import BLOCK


ROOT = Path(__file__).parents[1]

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
whole = mbx.SequenceClassifierConfig(
    mbx.LanguageModelConfig(256, (mbx.BlockConfig(mbx.Mamba1Config(8)),)), n_classes=3
).build(key=keys[0])
classes: jax.Array = whole(jax.numpy.zeros(5, int), length=3)
mbx.testing.check_laws(block)
"""

# The functions of the pages have no annotations, and what JAX, Equinox and the `PyTree` of
# jaxtyping return is unknown to pyright. Other rules find mistakes of ours.
UNANNOTATED = {
    "reportMissingParameterType",
    "reportUnknownArgumentType",
    "reportUnknownLambdaType",
    "reportUnknownParameterType",
    "reportUnknownVariableType",
}
UNKNOWN_MEMBER = "reportUnknownMemberType"
# What pyright says of a class whose methods without annotations call each other through a subclass.
CIRCULAR = "depends on itself"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What pyright says about the README, the tutorial and the code above."""
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    project = tmp_path_factory.mktemp("project")
    (project / "user.py").write_text(CODE)
    for page in ("README.md", "docs/tutorial.md"):
        text = (ROOT / page).read_text("utf-8")
        code = "\n".join(block["code"] for block in BLOCK.finditer(text))
        (project / f"{Path(page).stem.lower()}.py").write_text(code)
    (project / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]})
    )
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(project)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=project)
    return json.loads(result.stdout)["generalDiagnostics"]


@pytest.mark.slow
def test_pages_have_no_other_errors(found: list[dict[str, Any]]):
    """Wrong arguments, private names and missing type arguments are found by rules of their own."""
    allowed = {*UNANNOTATED, UNKNOWN_MEMBER}
    others = [error for error in found if error.get("rule") not in allowed]
    assert [error for error in others if not error["message"].endswith(CIRCULAR)] == []
    # The project was checked: pages without annotations have errors.
    assert {error.get("rule") for error in found} > {"reportMissingParameterType"}


@pytest.mark.slow
def test_generic_classes_are_known_without_a_type_argument(found: list[dict[str, Any]]):
    """`mbx.Block` in an annotation is complete."""
    generic = re.compile(r"\b(Abstract\w+|Block|Unrolled|Stacked|Bidirectional|Parallel)\[Unknown")
    messages = [error["message"] for error in found]
    assert [message for message in messages if generic.search(message)] == []
    own = [m["message"] for m in found if Path(m["file"]).name == "user.py"]
    assert [
        message for message in own if "type argument" in message or "mamba_eqx" in message
    ] == []
