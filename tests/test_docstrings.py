"""Public docstrings are complete, and their code runs."""

import ast
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from tests.support.public_names import public_objects


BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Dunder methods follow Python's protocols, and their classes document them.
DOCUMENTED_DUNDERS = {"__init__", "__call__"}


class Documented(NamedTuple):
    name: str
    function: Callable[..., Any]
    docstring: str


def functions() -> Iterator[Documented]:
    """Yields all public functions and methods; a constructor includes its class's docstring."""
    for name, value in public_objects().items():
        if inspect.isfunction(value):
            yield Documented(name, value, inspect.getdoc(value) or "")
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            function = inspect.unwrap(getattr(function, "method", function))
            hidden = attribute.startswith("_") and attribute not in DOCUMENTED_DUNDERS
            if hidden or not inspect.isfunction(function) or not in_package(function):
                continue
            if attribute != "__init__" and is_override(value, attribute):
                continue
            docstring = inspect.getdoc(function) or ""
            if attribute == "__init__":
                docstring = f"{inspect.getdoc(value)}\n{docstring}"
            yield Documented(f"{name}.{attribute}", function, docstring)


def is_override(cls: type, name: str) -> bool:
    """Returns whether a base class of the package documents the method."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("mamba_eqx")]
    return any(vars(base)[name].__doc__ for base in bases if name in vars(base))


def in_package(function: Callable[..., Any]) -> bool:
    # Dataclasses and equinox generate constructors, which have no source.
    return Path(function.__code__.co_filename).is_relative_to(Path(mbx.__file__).parent)


FUNCTIONS = [found for found in functions() if "See [`" not in found.docstring[:60]]


def test_every_public_name_has_a_docstring():
    missing = [found.name for found in FUNCTIONS if not found.docstring.strip()]
    # Constants are described in the docs, since they cannot have docstrings.
    objects = {name: value for name, value in public_objects().items() if callable(value)}
    missing += [name for name, value in objects.items() if not inspect.getdoc(value)]
    assert_only_known(set(missing), "docstring")


def test_arguments_are_documented():
    missing = {
        found.name
        for found in FUNCTIONS
        if any(name not in ("self", "cls") for name in inspect.signature(found.function).parameters)
        and "**Argument" not in found.docstring
    }
    assert_only_known(missing, "arguments")


def test_returned_values_are_documented():
    missing = set()
    for found in FUNCTIONS:
        returned = inspect.signature(found.function).return_annotation
        # The one sentence of a small function says what it returns: "Encodes a text as tokens."
        told = re.match("(Returns|Yields) |[A-Z][a-z]*s [^\n]*$", found.docstring)
        if returned in (None, inspect.Signature.empty) or told:
            continue
        if "**Returns" not in found.docstring:
            missing.add(found.name)
    assert_only_known(missing, "returns")


def test_raised_errors_are_documented():
    missing = {
        found.name
        for found in FUNCTIONS
        if found.function.__qualname__ in raising(found.function.__code__.co_filename)
        and "**Raises" not in found.docstring
    }
    assert_only_known(missing, "raises")


def assert_only_known(missing: set[str], part: str) -> None:
    known = INCOMPLETE[part]
    assert missing <= known, f"without {part}: {sorted(missing - known)}"
    assert known <= missing, f"complete by now, remove from the list: {sorted(known - missing)}"


@functools.cache
def raising(file: str) -> set[str]:
    """Returns the functions of a file that raise a `ValueError`, directly or through each other."""
    bodies: dict[str, ast.AST] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                bodies[prefix + child.name] = child
                if isinstance(child, ast.ClassDef):
                    collect(child, f"{prefix}{child.name}.")

    collect(ast.parse(Path(file).read_text("utf-8")), "")
    bodies = {name: body for name, body in bodies.items() if isinstance(body, ast.FunctionDef)}

    def names(body: ast.AST, kind: type[ast.Raise] | type[ast.Call]) -> set[str]:
        nodes = [node for node in ast.walk(body) if isinstance(node, kind)]
        calls = [node if isinstance(node, ast.Call) else node.exc for node in nodes]
        functions = [node.func if isinstance(node, ast.Call) else node for node in calls]
        return {node.id for node in functions if isinstance(node, ast.Name)}

    found = {name for name, body in bodies.items() if "ValueError" in names(body, ast.Raise)}
    while more := {
        name for name, body in bodies.items() if name not in found and names(body, ast.Call) & found
    }:
        found |= more
    return found


# --- Code in docstrings ---

# Blocks that cannot run, with the reason.
NOT_RUN = {
    "mamba_eqx.from_pretrained": "it downloads",
    "mamba_eqx.push_to_hub": "it uploads",
}


# What single blocks need in place of `names_in_docstrings`.
OTHER_NAMES = {
    "mamba_eqx.decoding_state": {"decoding_state": mbx.decoding_state},
    "mamba_eqx.training.fit": {"state": 0},
    "mamba_eqx.training.Streams": {"tokens": np.zeros(40_000, np.int32)},
}


def blocks() -> Iterator[tuple[str, str]]:
    """Yields the code of all public docstrings, by name."""
    for name, value in public_objects().items():
        documented = {name: inspect.getdoc(value) or ""}
        if inspect.isclass(value):
            members = {key: inspect.getdoc(member) for key, member in vars(value).items()}
            documented |= {f"{name}.{key}": text or "" for key, text in members.items()}
        for key, docstring in documented.items():
            code = "\n".join(match[1] for match in BLOCK.finditer(docstring))
            if code and key not in NOT_RUN:
                yield key, code


def names_in_docstrings() -> dict[str, Any]:
    """Returns what the code of a docstring may use without defining it."""
    block = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
    model = mbx.LanguageModelConfig(256, (block,)).build(key=jr.key(0))
    draft = mbx.LanguageModelConfig(256, (block,)).build(key=jr.key(1))

    def loss_of(logits: Any, tokens: Any = None) -> Any:
        logits = logits(tokens) if callable(logits) else logits
        return jnp.mean(jnp.square(jax.tree.leaves(logits)[0]))

    def step(state: Any, batch: Any) -> Any:
        return state + 1, {"loss": 0.5}

    return {
        "Path": Path,
        "LoRA": mbx.training.LoRA,
        "data": [0, 1, 2],
        "draft": draft,
        "eqx": eqx,
        "jax": jax,
        "jnp": jnp,
        "jr": jr,
        "key": jr.key(2),
        "loss": loss_of,
        "loss_of": loss_of,
        "mbx": mbx,
        "model": model,
        "np": np,
        "optax": optax,
        "prompt": np.arange(3),
        "prompts": [np.arange(3), np.arange(5)],
        "state": model.init_state(),
        "step": step,
        "tokenizer": mbx.ByteTokenizer(),
        "tokens": np.arange(12, dtype=np.int32),
        "training": mbx.training,
    }


@pytest.mark.parametrize(("name", "code"), [pytest.param(*b, id=b[0]) for b in blocks()])
def test_code_in_docstrings_runs(name, code, tmp_path, monkeypatch, as_users_run, compile_fast):
    module = types.ModuleType("code_in_docstring")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    vars(module).update(names_in_docstrings() | OTHER_NAMES.get(name, {}))
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, name, "exec"), vars(module))


INCOMPLETE: dict[str, set[str]] = {
    "docstring": set(),
    "arguments": {
        "mamba_eqx.ByteTokenizer.encode",
        "mamba_eqx.ByteTokenizer.token_bytes",
        "mamba_eqx.TextTokenizer.decode",
        "mamba_eqx.TextTokenizer.encode",
        "mamba_eqx.TextTokenizer.encode_piece",
        "mamba_eqx.TextTokenizer.token_bytes",
        "mamba_eqx.text.ByteDecoder.feed",
        "mamba_eqx.text.Decoder.feed",
        "mamba_eqx.text.TextDecoder.__init__",
        "mamba_eqx.text.TextDecoder.feed",
        "mamba_eqx.text.Tokenizer.decode",
        "mamba_eqx.text.Tokenizer.encode",
        "mamba_eqx.text.Tokenizer.token_bytes",
    },
    "returns": {
        "mamba_eqx.ByteTokenizer.decode",
        "mamba_eqx.ByteTokenizer.decoder",
        "mamba_eqx.ByteTokenizer.encode",
        "mamba_eqx.ByteTokenizer.token_bytes",
        "mamba_eqx.TextTokenizer.decode",
        "mamba_eqx.TextTokenizer.decoder",
        "mamba_eqx.TextTokenizer.encode",
        "mamba_eqx.TextTokenizer.encode_chat",
        "mamba_eqx.TextTokenizer.encode_piece",
        "mamba_eqx.TextTokenizer.to_json",
        "mamba_eqx.TextTokenizer.token_bytes",
        "mamba_eqx.text.ByteDecoder.end",
        "mamba_eqx.text.ByteDecoder.feed",
        "mamba_eqx.text.Decoder.end",
        "mamba_eqx.text.Decoder.feed",
        "mamba_eqx.text.TextDecoder.end",
        "mamba_eqx.text.TextDecoder.feed",
        "mamba_eqx.text.Tokenizer.decode",
        "mamba_eqx.text.Tokenizer.decoder",
        "mamba_eqx.text.Tokenizer.encode",
        "mamba_eqx.text.Tokenizer.token_bytes",
    },
    "raises": {
        "mamba_eqx.LanguageModel.backbone",
        "mamba_eqx.LanguageModel.backbone_step",
        "mamba_eqx.LanguageModel.hidden_states",
    },
}
