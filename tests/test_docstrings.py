"""Public docstrings are complete, and their code runs."""

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
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
    assert not missing


def test_arguments_are_documented():
    missing = {
        found.name
        for found in FUNCTIONS
        if any(name not in ("self", "cls") for name in inspect.signature(found.function).parameters)
        and "**Argument" not in found.docstring
    }
    assert not missing


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
    assert not missing


def test_raised_errors_are_documented():
    missing = {
        found.name
        for found in FUNCTIONS
        if found.function.__qualname__ in raising(found.function.__code__.co_filename)
        and "**Raises" not in found.docstring
    }
    assert not missing


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


# --- Fields and signatures ---

# These constructors are called by the library only, with functions of its own.
INTERNAL = {"mamba_eqx.generation.Stream.__init__"}


def test_fields_are_documented():
    """A field is named in the docstring of its class or of one that it links to, or has its own."""
    missing = []
    for name, value in public_objects().items():
        if not inspect.isclass(value) or not field_names(value):
            continue
        body = class_body(value)
        # Parameters of layers have the names of the official checkpoints.
        if any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in body):
            continue
        told = inspect.getdoc(value) or ""
        linked = [public_objects().get(link) for link in re.findall(r"\[`([\w.]+)`\]", told)]
        told += "".join(
            f"{inspect.getdoc(one)}{inspect.getdoc(one.__init__)}"
            for one in linked
            if inspect.isclass(one)
        )
        own = fields_with_docstring(body)
        missing += [
            f"{name}.{field}"
            for field in field_names(value)
            if f"`{field}`" not in told and field not in own
        ]
    assert not missing


def field_names(cls: type) -> list[str]:
    if issubclass(cls, enum.Enum):
        return [member.name for member in cls]
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
    else:
        names = list(getattr(cls, "_fields", ()))
    return [name for name in names if not name.startswith("_")]


def class_body(cls: type) -> list[ast.stmt]:
    tree = ast.parse(Path(inspect.getsourcefile(cls) or "").read_text("utf-8"))
    return next(
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )


def fields_with_docstring(body: list[ast.stmt]) -> set[str]:
    """Returns the fields that a string follows in the source."""
    found = set()
    for field, after in itertools.pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            targets = [field.target] if isinstance(field, ast.AnnAssign) else []
            targets = field.targets if isinstance(field, ast.Assign) else targets
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_names_in_signatures_have_a_page():
    public = {id(value) for value in public_objects().values()}
    annotations = [
        (f"{found.name}: {key}", annotation)
        for found in functions()
        if found.name not in INTERNAL
        for key, annotation in inspect.get_annotations(found.function).items()
    ]
    annotations += [
        (f"{name}.{key}", annotation)
        for name, value in public_objects().items()
        if inspect.isclass(value)
        for key, annotation in inspect.get_annotations(value).items()
        if not key.startswith("_")
    ]
    missing = {
        f"{where}: {cls.__qualname__}"
        for where, annotation in annotations
        for cls in classes_in(annotation)
        if id(cls) not in public
    }
    assert not missing


def classes_in(annotation: Any) -> Iterator[type]:
    """Yields the classes of the package in an annotation."""
    if isinstance(annotation, type) and annotation.__module__.startswith("mamba_eqx"):
        yield annotation
    parts = list(getattr(annotation, "__args__", None) or ())
    for part in [*parts, getattr(annotation, "__origin__", None)]:
        if part is not None and part is not annotation:
            yield from classes_in(part)


# --- Code in docstrings ---

# Blocks that cannot run, with the reason.
NOT_RUN = {
    "mamba_eqx.from_pretrained": "it downloads",
    "mamba_eqx.push_to_hub": "it uploads",
}


_BLOCK = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
_STACKED = mbx.LanguageModelConfig(16, (_BLOCK, _BLOCK))

# What single blocks need in place of `names_in_docstrings`.
OTHER_NAMES = {
    "mamba_eqx.Stacked.separate": {"model": _STACKED.build(stacked=True, key=jr.key(0))},
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [pytest.param(*b, id=b[0]) for b in blocks()])
def test_code_in_docstrings_runs(name, code, tmp_path, monkeypatch, as_users_run, compile_fast):
    module = types.ModuleType("code_in_docstring")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    vars(module).update(names_in_docstrings() | OTHER_NAMES.get(name, {}))
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, name, "exec"), vars(module))
