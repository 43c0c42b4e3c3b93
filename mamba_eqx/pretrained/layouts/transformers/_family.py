"""Families of models in transformers: reading and writing a config with a `model_type`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ....models import AttentionConfig, BlockConfig, LanguageModelConfig
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import find_mixers
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


def model_rows(
    *, vocab_size: int, tie_embeddings: bool, residual_in_fp32: bool
) -> tuple[Row[LanguageModelConfig], ...]:
    """Returns the rows of fields of the whole model, given their defaults in transformers."""

    def read_vocabulary(given: RowInput) -> Arguments:
        padded = given.fields.size("vocab_size", vocab_size)
        return {"vocab_size": given.fields.size(_UNPADDED, padded), "padded_vocab_size": padded}

    def write_vocabulary(config: LanguageModelConfig) -> JSON:
        padded = config.padded_vocab_size
        unpadded = {} if config.vocab_size == padded else {_UNPADDED: config.vocab_size}
        return {"vocab_size": padded, **unpadded}

    return (
        Row(read_vocabulary, write_vocabulary),
        flag("tie_word_embeddings", "tie_embeddings", tie_embeddings),
        flag("residual_in_fp32", "residual_in_fp32", residual_in_fp32),
        constant("hidden_act", "silu", written=True),
    )


@dataclass(frozen=True)
class Pattern:
    """The encoding of the attention layers in a config file.

    - `read`: returns the indices of the attention layers, given the total number of layers.
    - `write`: returns the fields of the file for the indices and the total number of layers.
    - `check`: raises `Unstorable` for indices that `write` cannot express.
    """

    read: Callable[[Fields, int], Collection[int]]
    write: Callable[[Collection[int], int], JSON]
    check: Callable[[Collection[int], int], None] = lambda indices, n_layer: None


@dataclass(frozen=True)
class Hybrid:
    """The additional properties of a family with attention layers and an MLP in every block.

    - `attention`: the table of the attention mixer.
    - `pattern`: the encoding of the attention layers.
    - `intermediate_size`: the default width of the MLPs.
    - `no_attention`: the fields to write for a model without attention layers.
    """

    attention: Table[AttentionConfig]
    pattern: Pattern
    intermediate_size: int
    no_attention: JSON


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    - `model_type`, `architecture`: the names of the config type and of the model class.
    - `d_model`, `n_layer`: the default sizes.
    - `norm_eps`: the name of the field for the eps of the norms, and its default.
    - `mixer`: the table of the Mamba mixer.
    - `model`: the table of the whole model. See `model_rows`.
    - `slots`: returns the slots of a model.
    - `embedding`: the name of the embedding's weight.
    - `hybrid`: the attention layers and MLPs, for families that have them.
    """

    model_type: str
    architecture: str
    d_model: int
    n_layer: int
    norm_eps: tuple[str, float]
    mixer: Table[Any]
    model: Table[LanguageModelConfig]
    slots: Callable[[LanguageModelConfig], list[Slot]]
    embedding: str
    hybrid: Hybrid | None = None

    def read(self, fields: Fields) -> LanguageModelConfig:
        """Reads a config.

        **Raises:** `CheckpointError` for invalid fields; `ValueError` of a config class.
        """
        shared = Shared(fields.size("hidden_size", self.d_model), fields.number(*self.norm_eps))
        n_layer = fields.layers("num_hidden_layers", self.n_layer)
        mixer = self.mixer.read(fields, shared)
        if self.hybrid is None:
            layers = (BlockConfig(mixer, norm_eps=shared.norm_eps),) * n_layer
        else:
            attention = self.hybrid.attention.read(fields, shared)
            indices = self.hybrid.pattern.read(fields, n_layer)
            width = fields.size("intermediate_size", self.hybrid.intermediate_size)
            blocks = [
                BlockConfig(kind, d_intermediate=width, norm_eps=shared.norm_eps)
                for kind in (mixer, attention)
            ]
            layers = tuple(blocks[i in indices] for i in range(n_layer))
        return self.model.read(fields, shared, layers=layers, norm_eps=shared.norm_eps)

    def validate(self, config: LanguageModelConfig) -> None:
        """Checks that the family can express a config.

        **Raises:** `Unstorable` if it cannot.
        """
        block, shared = config.layers[0], Shared(config.d_model, config.norm_eps)
        mixers, n_layer = find_mixers(config), len(config.layers)
        if not (block.rms_norm and config.rms_norm):
            raise Unstorable("LayerNorm (rms_norm=False)")
        if block.norm_eps != config.norm_eps:
            raise Unstorable(
                "norms with different values of `norm_eps` "
                f"({block.norm_eps} in the layers and {config.norm_eps} at the end)"
            )
        if self.hybrid is not None:
            if block.d_intermediate is None:
                raise Unstorable("attention layers without an MLP (d_intermediate=None)")
            self.hybrid.pattern.check(mixers.attention_layers, n_layer)
        if mixers.mixer is None:
            raise Unstorable(f"models of attention alone ({n_layer} layers)")
        self.mixer.check(mixers.mixer, shared)
        if self.hybrid is not None and mixers.attention is not None:
            self.hybrid.attention.check(mixers.attention, shared)
        self.model.check(config, shared)

    def write(self, config: LanguageModelConfig) -> JSON:
        """Returns the fields of the file for a config that `validate` accepts."""
        mixers, n_layer = find_mixers(config), len(config.layers)
        fields: JSON = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_size": config.d_model,
            "num_hidden_layers": n_layer,
            self.norm_eps[0]: config.norm_eps,
        }
        fields |= self.mixer.write(mixers.mixer)
        if self.hybrid is not None:
            hybrid = self.hybrid
            fields["intermediate_size"] = config.layers[0].d_intermediate
            fields |= hybrid.pattern.write(mixers.attention_layers, n_layer)
            if mixers.attention is None:
                fields |= hybrid.no_attention
            else:
                fields |= hybrid.attention.write(mixers.attention)
        return fields | self.model.write(config)
