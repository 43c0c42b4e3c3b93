"""Makes the notebooks of this folder from the scripts of the same names.

    python docs/notebooks/make.py

A line `# %%` begins a cell of code, and `# %% [markdown]` one of text, whose lines are comments.
"""

import json
import re
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__))
_START = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(script: str) -> list[tuple[bool, str]]:
    """Returns the cells of a script: whether each is text, and its content."""
    parts = _START.split(script)[1:]
    found = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        if kind is not None:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        found.append((kind is not None, body.strip("\n")))
    return found


def notebook(script: str) -> str:
    """Returns the notebook of a script, without outputs, as the JSON of its file."""
    content: dict[str, Any] = {
        "cells": [_cell(i, *cell) for i, cell in enumerate(cells(script))],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, is_text: bool, body: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": "markdown" if is_text else "code",
        "id": f"cell-{number}",
        "metadata": {},
        "source": body.splitlines(keepends=True),
    }
    return cell if is_text else cell | {"execution_count": None, "outputs": []}


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script.read_text("utf-8")), "utf-8")
