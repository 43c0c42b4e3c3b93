"""Families of models in transformers: reading and writing a config with a `model_type`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from ....models import BlockConfig, LanguageModelConfig
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import UNSCALED_BLOCK, layer_kind, only_one
from .._names import layer, norm, same, within
from .._tables import JSON, Arguments, Row, RowInput, Shared, Table, constant, flag


# Our own field for the size of the vocabulary without padding. transformers has no such field, and
# preserves fields that it does not know.
_UNPADDED = "unpadded_vocab_size"


# Initialisation, and the choice of an implementation.
MAMBA_IGNORED = frozenset(
    """
    initializer_range rescale_prenorm_residual time_step_scale time_step_min time_step_max
    time_step_init_scheme time_step_floor use_mambapy use_associative_scan
    """.split()  # noqa: SIM905
)


def vocabulary(default: int) -> Row[LanguageModelConfig]:
    """Returns the row of the size of the vocabulary, given its default in transformers."""

    def read(given: RowInput) -> Arguments:
        padded = given.fields.size("vocab_size", default)
        return {"vocab_size": given.fields.size(_UNPADDED, padded), "padded_vocab_size": padded}

    def write(config: LanguageModelConfig) -> JSON:
        padded = config.padded_vocab_size
        unpadded = {} if config.vocab_size == padded else {_UNPADDED: config.vocab_size}
        return {"vocab_size": padded, **unpadded}

    return Row(read, write)


def model_rows(
    *, vocab_size: int, tie_embeddings: bool, residual_in_fp32: bool
) -> tuple[Row[LanguageModelConfig], ...]:
    """Returns the rows of fields of the whole model, given their defaults in transformers."""
    return (
        vocabulary(vocab_size),
        flag("tie_word_embeddings", "tie_embeddings", tie_embeddings),
        flag("residual_in_fp32", "residual_in_fp32", residual_in_fp32),
        constant("hidden_act", "silu", written=True),
    )


class Kind(NamedTuple):
    """The parts that a layer consists of: the name of its mixer, and of its MLP if it has one."""

    mixer: str
    mlp: str | None


Kinds: TypeAlias = Sequence[Kind]


@dataclass(frozen=True)
class Pattern:
    """The encoding of the kinds of the layers in a config file.

    - `read`: returns the kinds of the layers, first layer first.
    - `write`: returns the fields of the file for the kinds.
    - `check`: raises `Unstorable` for kinds that `write` cannot express.
    """

    read: Callable[[Fields], Kinds]
    write: Callable[[Kinds], JSON]
    check: Callable[[Kinds], None]


def equal_layers(kind: Kind, *, n_layer: int) -> Pattern:
    """Returns the pattern of a family with one kind of layer.

    **Arguments:**

    - `kind`: the kind.
    - `n_layer`: the default number of layers.
    """

    def check(kinds: Kinds) -> None:
        for found in kinds:
            if found != kind:
                raise Unstorable("layers without an MLP" if kind.mlp else "layers with an MLP")

    return Pattern(
        read=lambda fields: [kind] * fields.count("num_hidden_layers", n_layer),
        write=lambda kinds: {"num_hidden_layers": len(kinds)},
        check=check,
    )


@dataclass(frozen=True)
class Part:
    """A kind of mixer, or of MLP, in a family.

    - `table`: the table of its config.
    - `slots`: returns the slots of a part with a config.
    - `module`: the name of the module in a layer of the file; empty if `slots` has the full names.
    - `absent`: the fields to write for a model without this part.
    - `unused`: the fields to ignore in the file of a model without this part, in which `table` is
        not read then. If `None`, it is read nonetheless.
    """

    table: Table[Any]
    slots: Callable[[Any], list[Slot]]
    module: str = ""
    absent: JSON = field(default_factory=dict)
    unused: Collection[str] | None = None


@dataclass(frozen=True)
class Names:
    """The names of parameters in a family, except for those of its parts.

    - `embedding`, `norm_f`: the embedding's weight, and the final norm.
    - `layers`: the list of the layers.
    - `norm`, `norm2`: the norms of a layer: that of the mixer, and that of the MLP.
    - `places`: returns the index in `layers` of the mixer and of the MLP of each layer.
    - `older`: the beginnings and endings of names in other versions, which files may have, and
        those that they stand for.
    - `modules`: the beginnings and endings of names that the modules of transformers have other
        names for, and those names.
    - `ignored`: the beginnings of the names of tensors that are not a part of the model.
    """

    embedding: str
    norm_f: str
    layers: str = "model.layers"
    norm: str = "input_layernorm"
    norm2: str = "pre_ff_layernorm"
    places: Callable[[Kinds], list[tuple[int, int]]] = lambda kinds: [
        (i, i) for i in range(len(kinds))
    ]
    older: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class _Found(NamedTuple):
    """The kinds of the layers of a model, and the configs of its mixers and MLPs by name."""

    kinds: Kinds
    mixers: dict[str, Any]
    mlps: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    - `model_type`, `architecture`: the names of the config type and of the model class.
    - `d_model`: the default width.
    - `norm_eps`: the name of the field for the eps of the norms, and its default.
    - `mixers`, `mlps`: the kinds of mixers and of MLPs by name.
    - `pattern`: the encoding of the kinds of the layers.
    - `block`: the rows of fields of `BlockConfig` that all layers share.
    - `model`: the table of the whole model. See `model_rows`.
    - `names`: the names of parameters.
    """

    model_type: str
    architecture: str
    d_model: int
    norm_eps: tuple[str, float]
    mixers: Mapping[str, Part]
    pattern: Pattern
    model: Table[LanguageModelConfig]
    names: Names
    mlps: Mapping[str, Part] = field(default_factory=dict)
    block: tuple[Row[Any], ...] = UNSCALED_BLOCK

    def read(self, fields: Fields) -> LanguageModelConfig:
        """Reads a config.

        **Raises:** `CheckpointError` for invalid fields; `ValueError` of a config class.
        """
        shared = Shared(fields.size("hidden_size", self.d_model), fields.number(*self.norm_eps))
        kinds = self.pattern.read(fields)
        mixers = _read_parts(self.mixers, {kind.mixer for kind in kinds}, fields, shared)
        mlps = _read_parts(self.mlps, {kind.mlp for kind in kinds}, fields, shared)
        block = Table(dict, self.block).read(fields, shared)
        layers = tuple(
            BlockConfig(
                mixers[kind.mixer],
                mlp=None if kind.mlp is None else mlps[kind.mlp],
                norm_eps=shared.norm_eps,
                **block,
            )
            for kind in kinds
        )
        return self.model.read(fields, shared, layers=layers, norm_eps=shared.norm_eps)

    def has_parts(self, config: LanguageModelConfig) -> bool:
        """Returns whether the family has all the kinds of mixers and MLPs of a model."""
        return all(
            _name_of(self.mixers, layer.mixer) is not None
            and (layer.mlp is None or _name_of(self.mlps, layer.mlp) is not None)
            for layer in config.layers
        )

    def validate(self, config: LanguageModelConfig) -> None:
        """Checks that the family can express a config of which it has all parts.

        **Raises:** `Unstorable` if it cannot.
        """
        block, shared = config.layers[0], Shared(config.d_model, config.norm_eps)
        for i, other in enumerate(config.layers):
            if replace(other, mixer=block.mixer, mlp=block.mlp) != block:
                raise Unstorable(f"layers that differ (layer 0 is {block}, layer {i} is {other})")
        if not (block.rms_norm and config.rms_norm):
            raise Unstorable("LayerNorm (rms_norm=False)")
        if block.norm_eps != config.norm_eps:
            raise Unstorable(
                "norms with different values of `norm_eps` "
                f"({block.norm_eps} in the layers and {config.norm_eps} at the end)"
            )
        kinds, mixers, mlps = self._find(config)
        self.pattern.check(kinds)
        for name, mixer in mixers.items():
            self.mixers[name].table.check(mixer, shared)
        for name, mlp in mlps.items():
            self.mlps[name].table.check(mlp, shared)
        for row in self.block:
            row.check(block, shared)
        self.model.check(config, shared)

    def write(self, config: LanguageModelConfig) -> JSON:
        """Returns the fields of the file for a config that `validate` accepts."""
        kinds, mixers, mlps = self._find(config)
        fields: JSON = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_size": config.d_model,
            self.norm_eps[0]: config.norm_eps,
        }
        fields |= self.pattern.write(kinds)
        for parts, found in ((self.mixers, mixers), (self.mlps, mlps)):
            for name, part in parts.items():
                fields |= part.table.write(found[name]) if name in found else part.absent
        for row in self.block:
            fields |= row.write(config.layers[0])
        return fields | self.model.write(config)

    def slots(self, config: LanguageModelConfig) -> list[Slot]:
        """Returns the slots of a model, for a config that `validate` accepts."""
        names = self.names
        slots = [Slot(names.embedding, "embedding.weight")]
        kinds, _, _ = self._find(config)
        for i, (block, kind, places) in enumerate(
            zip(config.layers, kinds, names.places(kinds), strict=True)
        ):
            of_mixer, of_mlp = (f"{names.layers}.{place}" for place in places)
            path = layer(i)
            slots += norm(f"{of_mixer}.{names.norm}", f"{path}.norm", rms_norm=True)
            slots += _part_slots(self.mixers[kind.mixer], block.mixer, of_mixer, f"{path}.mixer")
            if kind.mlp is not None:
                slots += norm(f"{of_mlp}.{names.norm2}", f"{path}.norm2", rms_norm=True)
                slots += _part_slots(self.mlps[kind.mlp], block.mlp, of_mlp, f"{path}.mlp")
        slots += norm(names.norm_f, "norm_f", rms_norm=True)
        return slots if config.tie_embeddings else [*slots, *same("lm_head.weight")]

    def count(self, config: LanguageModelConfig) -> int:
        """Returns the length of `slots`, from the slots of one layer of each kind."""
        kinds, mixers, mlps = self._find(config)
        # Each part has a norm.
        of_mixer = {name: 1 + len(self.mixers[name].slots(part)) for name, part in mixers.items()}
        of_mlp = {name: 1 + len(self.mlps[name].slots(part)) for name, part in mlps.items()}
        layers = sum(of_mixer[k.mixer] + (of_mlp[k.mlp] if k.mlp else 0) for k in kinds)
        return layers + (2 if config.tie_embeddings else 3)

    def _find(self, config: LanguageModelConfig) -> _Found:
        """Finds the parts of a model.

        **Raises:** `Unstorable` if two parts of one kind differ.
        """
        kinds: list[Kind] = []
        mixers: dict[str, list[Any]] = {}
        mlps: dict[str, list[Any]] = {}
        for block in config.layers:
            mixer = _name_of(self.mixers, block.mixer)
            mlp = None if block.mlp is None else _name_of(self.mlps, block.mlp)
            assert mixer is not None  # As `has_parts` ensures.
            mixers.setdefault(mixer, []).append(block.mixer)
            if mlp is not None:
                mlps.setdefault(mlp, []).append(block.mlp)
            kinds.append(Kind(mixer, mlp))
        return _Found(
            kinds,
            {name: only_one(found, "mixer") for name, found in mixers.items()},
            {name: only_one(found, "MLP") for name, found in mlps.items()},
        )


def describe_parts(config: LanguageModelConfig) -> str:
    """Returns the kinds of mixers and MLPs of a model, for messages."""
    kinds = {layer_kind(layer.mixer) for layer in config.layers}
    kinds |= {layer_kind(layer.mlp) for layer in config.layers if layer.mlp is not None}
    return f"{' and '.join(sorted(kinds))} layers" + (" in one model" if len(kinds) > 1 else "")


def _read_parts(
    parts: Mapping[str, Part], used: Collection[str | None], fields: Fields, shared: Shared
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if name in used or part.unused is None:
            found[name] = part.table.read(fields, shared)
        else:
            fields.ignore({*part.unused, *part.table.ignored})
    return found


def _name_of(parts: Mapping[str, Part], config: object) -> str | None:
    for name, part in parts.items():
        if part.table.config is type(config):
            return name
    return None


def _part_slots(part: Part, config: object, layer: str, path: str) -> list[Slot]:
    name = f"{layer}.{part.module}" if part.module else layer
    return within(part.slots(config), name, path)
