"""The definition of a checkpoint layout: how configs and parameters are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array

from ...formats import CheckpointError
from ...models import LanguageModelConfig


AnyArray = TypeVar("AnyArray", np.ndarray, Array, np.ndarray | Array)


@runtime_checkable
class Described(Protocol):
    """Anything with a shape and a dtype: an array, or a tensor whose values are still in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


@runtime_checkable
class View(Protocol):
    """A function from a NumPy or JAX array to a view of it, or to a rearranged copy."""

    def __call__(self, array: AnyArray, /) -> AnyArray: ...


def _same(array: AnyArray, /) -> AnyArray:
    return array


@dataclass(frozen=True)
class Transform:
    """A reversible rearrangement that maps an array of the model to one in the file.

    - `to_file`: maps an array of the model to an array in the file.
    - `from_file`: the inverse of `to_file`.
    """

    to_file: View
    from_file: View


IDENTITY = Transform(_same, _same)


@dataclass(frozen=True)
class Slot:
    """The correspondence between a tensor of a checkpoint and a leaf of the model.

    A leaf may be divided among several tensors, each of which holds some of its rows. A leaf with
    the weights of several experts, `(n_experts, rows, ...)`, may be divided by experts as well.

    - `name`: the name of the tensor in the file.
    - `path`: the path of the leaf in a model with `Unrolled` layers, such as
        `"layers.layers.0.mixer.A_log"`.
    - `transform`: maps the leaf, or the rows of it, to the tensor.
    - `rows`: the first row of the leaf in the tensor, and the row after the last; all rows if
        `None`.
    - `expert`: the index of the expert whose rows these are; `None` if the leaf has no experts, or
        the tensor holds all of them.
    """

    name: str
    path: str
    transform: Transform = IDENTITY
    rows: tuple[int, int] | None = None
    expert: int | None = None

    def within(self, name: str, path: str) -> "Slot":
        """Returns the slot with `name` and `path` as prefixes of its own."""
        return replace(self, name=f"{name}.{self.name}", path=f"{path}.{self.path}")

    def to_file(self, leaf: AnyArray) -> AnyArray:
        """Returns the part of a leaf that this tensor stores."""
        rows = slice(None) if self.rows is None else slice(*self.rows)
        if self.expert is not None:
            return self.transform.to_file(leaf[self.expert, rows])
        return self.transform.to_file(leaf if self.rows is None else leaf[rows])

    def from_file(self, tensor: AnyArray) -> AnyArray:
        """Returns the part of the leaf that a tensor stores: the inverse of `to_file`."""
        return self.transform.from_file(tensor)

    def file_shape(self, leaf: Described) -> tuple[int, ...]:
        """Returns the shape of the tensor for a leaf of the given shape."""
        # A broadcast number takes no memory, however absurd the shape is.
        return self.to_file(np.broadcast_to(np.float32(0), leaf.shape)).shape


class Unstorable(Exception):
    """An error for a config that a layout cannot store.

    The message completes the sentence "The layout cannot store ...". `Layout.check` converts the
    error into a `CheckpointError`.
    """


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout.

    - `name`: the name by which users choose the layout.
    - `read_config`: converts the content of a config file into a config.
    - `validate`: raises `Unstorable` for a config that the layout cannot store. See `check`.
    - `write_config`: converts a config that `check` accepts, and the dtype of the weights, into the
        content of a config file.
    - `table`: returns the slots of a model, for a config that `check` accepts.
    - `embedding`: returns the name of the embedding's weight, for a config that `check` accepts.
    - `keeps_tied_head`: whether files of a model with tied embeddings store the head as well.
    - `renames`: returns the beginnings and endings of tensor names in other versions, which files
        may have, and those in the table that they stand for, for a config that `check` accepts.
    - `modules`: returns the beginnings and endings of names in the table that the modules of
        transformers have other names for, and those names, for a config that `check` accepts.
    - `ignored`: returns the beginnings of the names of tensors that files may have and that are not
        a part of the model, for a config that `check` accepts.
    - `count`: returns the length of the table, for a config that `check` accepts, if that is faster
        than making the table. See `number_of_slots`.
    - `head`: the name of the head's weight.
    - `config_file`, `weights_file`: the names of the files.
    - `declares_ids`: whether the config declares the ids of special tokens, in the fields of
        transformers.
    """

    name: str
    read_config: Callable[[object], LanguageModelConfig]
    validate: Callable[[LanguageModelConfig], None]
    write_config: Callable[[LanguageModelConfig, np.dtype], dict[str, object]]
    table: Callable[[LanguageModelConfig], list[Slot]]
    embedding: Callable[[LanguageModelConfig], str]
    keeps_tied_head: bool
    renames: Callable[[LanguageModelConfig], Mapping[str, str]] = lambda _: {}
    modules: Callable[[LanguageModelConfig], Mapping[str, str]] = lambda _: {}
    ignored: Callable[[LanguageModelConfig], tuple[str, ...]] = lambda _: ()
    count: Callable[[LanguageModelConfig], int] | None = None
    head: str = "lm_head.weight"
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"
    declares_ids: bool = False

    def check(self, config: LanguageModelConfig) -> None:
        """Checks that the layout can store a config.

        **Raises:** `CheckpointError` if it cannot.
        """
        try:
            self.validate(config)
        except Unstorable as error:
            raise CheckpointError(f"The {self.name!r} layout cannot store {error}.") from None

    def number_of_slots(self, config: LanguageModelConfig) -> int:
        """Returns the number of slots of a model, for a config that `check` accepts."""
        return len(self.table(config)) if self.count is None else self.count(config)

    def tied_head(self, config: LanguageModelConfig) -> str | None:
        """Returns the name under which a file may repeat the embedding, or `None` if not tied."""
        return self.head if config.tie_embeddings else None
