"""transformers' model type `mamba2`. The defaults are those of its `Mamba2Config`."""

from ....models import LanguageModelConfig, Mamba2Config
from .._layout import Unstorable
from .._mixers import D_MODEL, UNSCALED, UNSCALED_MAMBA2, whole_expand
from .._names import mamba2
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Shared,
    Table,
    fixed,
    flag,
    limit,
    shared_eps,
    size,
)
from ._family import MAMBA_IGNORED, Family, Kind, Part, equal_layers, model_rows
from ._mamba import OFFICIAL_NAMES


def _check_d_ssm(config: Mamba2Config, _: Shared) -> None:
    if config.d_ssm != config.d_inner:
        raise Unstorable(
            "Mamba-2 layers that use some channels as an MLP "
            f"(d_ssm={config.d_ssm} and d_inner={config.d_inner})"
        )


# The options of Mamba-2 that no model type of transformers has, and those that most do not have.
NEVER_SUPPORTED: tuple[Row[Mamba2Config], ...] = (
    Row(check=_check_d_ssm),
    fixed("D_has_hdim", False, "Mamba-2 layers whose `D` has a weight for each channel"),
)
UNSUPPORTED: tuple[Row[Mamba2Config], ...] = (
    *NEVER_SUPPORTED,
    fixed("rms_norm", True, "Mamba-2 layers without a norm"),
    fixed("norm_before_gate", False, "Mamba-2 layers with the norm before the gate"),
    *UNSCALED_MAMBA2,
)


def _read_heads(given: RowInput) -> Arguments:
    fields, d_inner = given.fields, given.known["d_inner"]
    nheads, headdim = fields.size("num_heads", 128), fields.size("head_dim", 64)
    if nheads * headdim != d_inner:
        raise fields.error(
            "num_heads",
            f"times head_dim={headdim} must be hidden_size * expand = {d_inner}",
        )
    return {"headdim": headdim}


def _write_heads(config: Mamba2Config) -> JSON:
    return {"num_heads": config.d_inner // config.headdim, "head_dim": config.headdim}


MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    d_model=4096,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixers={
        "mamba": Part(
            Table(
                Mamba2Config,
                (
                    D_MODEL,
                    whole_expand("expand"),
                    *UNSUPPORTED,
                    Row(_read_heads, _write_heads),
                    size("n_groups", "ngroups", 8),
                    size("state_size", "d_state", 128),
                    size("conv_kernel", "d_conv", 4),
                    flag("use_bias", "bias", False),
                    flag("use_conv_bias", "conv_bias", True),
                    limit("time_step_limit", "dt_limit"),
                    shared_eps(),
                ),
                # The chunk size does not affect the result. transformers computes the width and
                # ignores `intermediate_size` and `time_step_rank`. Old versions wrote the options
                # of the norm, but never read them.
                ignored=MAMBA_IGNORED
                | {
                    "chunk_size",
                    "intermediate_size",
                    "norm_before_gate",
                    "rms_norm",
                    "time_step_rank",
                },
            ),
            mamba2,
            "mixer",
        )
    },
    pattern=equal_layers(Kind("mamba", None), n_layer=64),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=32768, tie_embeddings=False, residual_in_fp32=True),
            *UNSCALED,
        ),
    ),
    names=OFFICIAL_NAMES,
)
