"""The repository that the tests of hostile Hubs load."""

import tempfile
from pathlib import Path

from mamba_eqx.pretrained import save_pretrained
from tests.support.checkpoints import BOTH, make


NAME = "me/mine"
MODEL = make(BOTH["tied"])


def _files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(MODEL, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


FILES = _files()
CONFIG, WEIGHTS = "config.json", "model.safetensors"
