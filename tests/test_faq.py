"""The page of errors has the messages of the package, word by word."""

import ast
import functools
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
MESSAGE = re.compile(r"^``` \{ \.text \.message \}\n(.+?)\n```$", re.MULTILINE | re.DOTALL)
MESSAGES = MESSAGE.findall((ROOT / "docs" / "faq.md").read_text("utf-8"))


@functools.cache
def strings() -> set[tuple[str, ...]]:
    """Returns the strings of the package: for each, the words between its values."""
    found = set()
    for path in (ROOT / "mamba_eqx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                found.add(tuple(part for part in parts if isinstance(part, str)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add((node.value,))
    return {parts for parts in found if sum(map(len, parts)) > 15}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_message_is_the_packages(message: str):
    """Nearly all of a message is in strings of the package, or in the values within them."""
    covered = [False] * len(message)
    for parts in strings():
        if all(part in message for part in parts):
            pattern = ".+?".join(map(re.escape, parts))
            for match in re.finditer(pattern, message):
                covered[match.start() : match.end()] = [True] * len(match[0])
    assert sum(covered) > 0.75 * len(message), "".join(
        letter if told else f"[{letter}]" for letter, told in zip(message, covered, strict=True)
    )
