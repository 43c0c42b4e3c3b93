"""The contestant's side of `compare.py`: a process that holds one model and answers requests.

Requests and replies are lines of JSON on the standard input and output. A request has one key:

- `{"open": {"folder": ..., "form": ..., "threads": ...}}` loads a checkpoint in the layout of
  transformers.
- `{"prepare": {"kind": ..., "tokens": FILE, "check": FILE, "output": FILE, ...}}` prepares a task,
  runs it once, and writes what it computed, so that the other side can compare it. Before a task of
  decoding it also writes the logits of the prompt in `check`.
- `{"run": {}}` runs the task again and returns the seconds.

A reply is `{"skipped": REASON}` if the library cannot do what was asked for, and `{"error": ...}`
if it failed.
"""

import abc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """A piece of work that is ready to be timed.

    **Fields:**

    - `run`: does the work, and returns when it is done.
    - `read`: turns what `run` returned into arrays by name; it is not timed.
    - `memory`: the temporary memory of the program in MiB, where it is known.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Any]]
    memory: float | None = None


class Contestant(abc.ABC):
    """A model in some library. A method raises `NotImplementedError` where the library lacks it."""

    weight_bytes: int
    """The bytes of weights that decoding one token reads."""

    @abc.abstractmethod
    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """Returns the logits of one sequence, of all tokens or of the last one: `logits`."""

    @abc.abstractmethod
    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """Returns `new` greedy tokens after each prompt of one token: `tokens`."""

    @abc.abstractmethod
    def train(self, tokens: np.ndarray) -> Task:
        """Returns the mean cross-entropy of the next token and its gradients: `loss`, and
        `gradient`, that of the embedding."""


class Request(NamedTuple):
    """What to open: a checkpoint, the form of its weights, and the number of threads."""

    folder: Path
    form: str
    threads: int


def serve(make: Callable[[Request], Contestant], packages: tuple[str, ...]) -> None:
    """Answers requests until the input ends.

    **Arguments:**

    - `make`: loads a contestant.
    - `packages`: the distributions whose versions are reported.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Libraries may print, which must not disturb the replies.
    state = _State(make, packages)
    for line in sys.stdin:
        ((verb, options),) = json.loads(line).items()
        try:
            reply = {"open": state.open, "prepare": state.prepare, "run": state.run}[verb](options)
        except (ImportError, NotImplementedError) as reason:
            reply = {"skipped": str(reason)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Some packages are optional.
        return None


class _State:
    def __init__(self, make: Callable[[Request], Contestant], packages: tuple[str, ...]):
        self._make = make
        self._packages = packages
        self._contestant: Contestant | None = None
        self._task: Task | None = None

    def open(self, options: dict[str, Any]) -> dict[str, object]:
        self._contestant = self._task = None  # frees the model before
        self._contestant = self._make(
            Request(Path(options["folder"]), options["form"], options["threads"])
        )
        return {
            "versions": {
                name: version for name in self._packages if (version := _version(name)) is not None
            },
            "weight_bytes": self._contestant.weight_bytes,
        }

    def prepare(self, options: dict[str, Any]) -> dict[str, object]:
        assert self._contestant is not None
        self._task = None
        tokens, kind = np.load(options["tokens"]), options["kind"]
        found: dict[str, np.ndarray] = {}
        if kind == "prefill":
            self._task = self._contestant.prefill(tokens, all_logits=options["all_logits"])
        elif kind == "decode":
            # Tokens say little about narrow weights: the first that differs changes all after it.
            found = _outputs(self._contestant.prefill(np.load(options["check"]), all_logits=True))
            self._task = self._contestant.decode(tokens, options["new"])
        else:
            self._task = self._contestant.train(tokens)
        found |= _outputs(self._task)
        if "logits" in found:
            # All of them would be hundreds of megabytes. An error in an early row spreads to later
            # ones, so sixteen rows show it.
            logits = np.atleast_2d(found["logits"])
            found["logits"] = logits[np.linspace(0, len(logits) - 1, 16).astype(int)]
        np.savez(options["output"], allow_pickle=False, **found)
        return {"memory": self._task.memory}

    def run(self, _: object) -> dict[str, object]:
        assert self._task is not None
        start = time.perf_counter()
        self._task.run()
        return {"seconds": time.perf_counter() - start}


def _outputs(task: Task) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in task.read(task.run()).items()}
    return {
        name: array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float32)
        for name, array in arrays.items()
    }


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint by name."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config(folder: Path) -> dict[str, Any]:
    """Returns the config of a checkpoint.

    **Raises:** a `NotImplementedError` if the checkpoint is not of Mamba-1 layers, for the
    libraries that run no others here.
    """
    values = json.loads((folder / "config.json").read_text("utf-8"))
    if values["model_type"] != "mamba":
        raise NotImplementedError(f"no {values['model_type']} models are measured here")
    return values
