"""What the model types of transformers share."""

from collections.abc import Iterable

from ....formats import CheckpointError
from ....models import BlockConfig, LanguageModelConfig
from .._fields import Fields


# Ours: transformers has no field for it, and keeps what it does not know.
UNPADDED = "unpadded_vocab_size"


# How to initialise, and which implementation to run.
MAMBA_IGNORED = frozenset(
    """
    initializer_range rescale_prenorm_residual time_step_scale time_step_min time_step_max
    time_step_init_scheme time_step_floor use_mambapy use_associative_scan
    """.split()  # noqa: SIM905
)


def read_model(
    fields: Fields,
    layers: Iterable[BlockConfig],
    *,
    vocab_size: int,
    norm_eps: float,
    tie_embeddings: bool,
    residual_in_fp32: bool,
) -> LanguageModelConfig:
    """A model of these layers; the others are what its type has where the config says nothing."""
    padded = fields.size("vocab_size", vocab_size)
    return LanguageModelConfig(
        vocab_size=fields.size(UNPADDED, padded),
        padded_vocab_size=padded,
        layers=tuple(layers),
        tie_embeddings=fields.flag("tie_word_embeddings", tie_embeddings),
        norm_eps=norm_eps,
        residual_in_fp32=fields.flag("residual_in_fp32", residual_in_fp32),
    )


def inexpressible(what: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The 'transformers' layout has no model whose {what} ({value}). "
        'Use `layout="state-spaces"` if that fits.'
    )
