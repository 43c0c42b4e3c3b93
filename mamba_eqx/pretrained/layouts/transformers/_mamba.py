"""transformers' model types `mamba` and `falcon_mamba`, which differ in three norms.

The defaults are those of `MambaConfig` and `FalconMambaConfig`, which agree.
"""

from ....models import LanguageModelConfig, Mamba1Config
from .._layout import Slot
from .._mixers import D_MODEL, dt_rank
from .._names import language_model
from .._tables import JSON, Arguments, Row, RowInput, Table, fixed, flag, number, size
from ._family import MAMBA_IGNORED, Family, model_rows


EMBEDDING = "backbone.embeddings.weight"


def _read_width(given: RowInput) -> Arguments:
    # transformers uses `intermediate_size` if it contradicts `expand`, as in Falcon-Mamba's config.
    expanded = given.fields.multiple_of(given.shared.d_model, "expand", 2)
    return {"d_inner": given.fields.size("intermediate_size", expanded)}


def _write_width(config: Mamba1Config) -> JSON:
    # `expand` must be an integer. If the integer is inexact, `intermediate_size` takes precedence.
    expand = max(1, config.d_inner // config.d_model)
    return {"intermediate_size": config.d_inner, "expand": expand}


_ROWS: tuple[Row[Mamba1Config], ...] = (
    D_MODEL,
    Row(_read_width, _write_width),
    size("state_size", "d_state", 16),
    size("conv_kernel", "d_conv", 4),
    dt_rank("time_step_rank"),
    flag("use_bias", "bias", False),
    flag("use_conv_bias", "conv_bias", True),
)


def name_plain(config: LanguageModelConfig) -> list[Slot]:
    """Returns the slots of a model without attention: official names, except the embedding's."""
    return language_model(config, embedding=EMBEDDING)


MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    d_model=768,
    n_layer=32,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixer=Table(
        Mamba1Config,
        (
            *_ROWS,
            fixed("select_norm", None, "weighted norms of `dt`, `B` and `C`, but no MLPs"),
        ),
        ignored=MAMBA_IGNORED,
    ),
    model=Table(
        LanguageModelConfig,
        model_rows(vocab_size=50280, tie_embeddings=True, residual_in_fp32=True),
        # The `-hf` conversions kept these from official configs. transformers does not read them,
        # and has fields of its own for the same things.
        ignored=(
            "d_model",
            "d_inner",
            "n_layer",
            "ssm_cfg",
            "rms_norm",
            "fused_add_norm",
            "pad_vocab_size_multiple",
        ),
    ),
    slots=name_plain,
    embedding=EMBEDDING,
)

FALCON_MAMBA = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    d_model=768,
    n_layer=32,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixer=Table(
        Mamba1Config,
        (
            *_ROWS,
            fixed("select_norm", "weightless", "norms of `dt`, `B` and `C` with weights"),
            # The original checkpoints lack the field.
            number("mixer_rms_eps", "select_norm_eps", 1e-6),
        ),
        ignored=MAMBA_IGNORED | {"use_falcon_mambapy"},
    ),
    model=Table(
        LanguageModelConfig,
        model_rows(vocab_size=50280, tie_embeddings=True, residual_in_fp32=True),
    ),
    slots=name_plain,
    embedding=EMBEDDING,
)
