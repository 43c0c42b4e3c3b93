"""transformers' model types `mamba` and `falcon_mamba`, which differ in three norms.

The defaults are those of `MambaConfig` and `FalconMambaConfig`, which agree.
"""

from ....models import LanguageModelConfig, Mamba1Config
from .._mixers import D_MODEL, UNSCALED, dt_rank
from .._names import mamba1
from .._tables import JSON, Arguments, Row, RowInput, Table, fixed, flag, number, size
from ._family import MAMBA_IGNORED, Family, Kind, Names, Part, equal_layers, model_rows


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


OFFICIAL_NAMES = Names(
    embedding="backbone.embeddings.weight",
    norm_f="backbone.norm_f",
    layers="backbone.layers",
    norm="norm",
)


MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    d_model=768,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixers={
        "mamba": Part(
            Table(
                Mamba1Config,
                (
                    *_ROWS,
                    fixed("select_norm", None, "weighted norms of `dt`, `B` and `C`, but no MLPs"),
                ),
                ignored=MAMBA_IGNORED,
            ),
            mamba1,
            "mixer",
        )
    },
    pattern=equal_layers(Kind("mamba", None), n_layer=32),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=50280, tie_embeddings=True, residual_in_fp32=True),
            *UNSCALED,
        ),
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
    names=OFFICIAL_NAMES,
)

FALCON_MAMBA = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    d_model=768,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixers={
        "mamba": Part(
            Table(
                Mamba1Config,
                (
                    *_ROWS,
                    fixed("select_norm", "weightless", "norms of `dt`, `B` and `C` with weights"),
                    # The original checkpoints lack the field.
                    number("mixer_rms_eps", "select_norm_eps", 1e-6),
                ),
                ignored=MAMBA_IGNORED | {"use_falcon_mambapy"},
            ),
            mamba1,
            "mixer",
        )
    },
    pattern=equal_layers(Kind("mamba", None), n_layer=32),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=50280, tie_embeddings=True, residual_in_fp32=True),
            *UNSCALED,
        ),
    ),
    names=OFFICIAL_NAMES,
)
