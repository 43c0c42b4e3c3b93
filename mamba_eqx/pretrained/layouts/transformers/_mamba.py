"""transformers' model types `mamba` and `falcon_mamba`, which differ in three norms."""

import math
from typing import Any, Literal

from ....models import BlockConfig, LanguageModelConfig, Mamba1Config
from .._fields import Fields
from ._common import MAMBA_IGNORED, inexpressible, read_model


# What the `-hf` conversions kept of the official config. transformers reads none of it, and
# neither do we: the same things are said under transformers' own names.
_MAMBA_OFFICIAL = frozenset(
    """
    d_model d_inner n_layer ssm_cfg rms_norm fused_add_norm pad_vocab_size_multiple
    """.split()  # noqa: SIM905
)


def read_mamba(fields: Fields) -> LanguageModelConfig:
    fields.ignore(_MAMBA_OFFICIAL)
    return _read(fields, select_norm=None, select_norm_eps=1e-6)


def read_falcon_mamba(fields: Fields) -> LanguageModelConfig:
    fields.ignore(["use_falcon_mambapy"])
    # The original checkpoints do not say it.
    eps = fields.number("mixer_rms_eps", 1e-6)
    return _read(fields, select_norm="weightless", select_norm_eps=eps)


def _read(
    fields: Fields, *, select_norm: Literal["weightless"] | None, select_norm_eps: float
) -> LanguageModelConfig:
    # The defaults are those of transformers' `MambaConfig` and `FalconMambaConfig` alike.
    d_model = fields.size("hidden_size", 768)
    expanded = fields.multiple_of(d_model, "expand", 2)
    fields.only("hidden_act", ["silu"], "silu")
    eps = fields.number("layer_norm_epsilon", 1e-5)
    mixer = Mamba1Config(
        d_model=d_model,
        # Where the two contradict each other, as in Falcon-Mamba's own config, transformers goes
        # by `intermediate_size`.
        d_inner=fields.size("intermediate_size", expanded),
        d_state=fields.size("state_size", 16),
        d_conv=fields.size("conv_kernel", 4),
        dt_rank=(
            math.ceil(d_model / 16)
            if fields.get("time_step_rank", "auto") == "auto"
            else fields.size("time_step_rank")
        ),
        bias=fields.flag("use_bias", False),
        conv_bias=fields.flag("use_conv_bias", True),
        select_norm=select_norm,
        select_norm_eps=select_norm_eps,
    )
    config = read_model(
        fields,
        (BlockConfig(mixer, norm_eps=eps),) * fields.layers("num_hidden_layers", 32),
        vocab_size=50280,
        norm_eps=eps,
        tie_embeddings=True,
        residual_in_fp32=True,
    )
    fields.ignore(MAMBA_IGNORED)
    return config


def write_mamba(config: LanguageModelConfig, mixer: Mamba1Config) -> dict[str, Any]:
    del config
    fields = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": mixer.d_inner,
        # It has to be an integer. Where that is inexact, `intermediate_size` wins.
        "expand": max(1, mixer.d_inner // mixer.d_model),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "time_step_rank": mixer.dt_rank,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }
    match mixer.select_norm:
        case None:
            return fields
        case "weightless":
            return fields | {
                "model_type": "falcon_mamba",
                "architectures": ["FalconMambaForCausalLM"],
                "mixer_rms_eps": mixer.select_norm_eps,
            }
    raise inexpressible(
        "norms of `dt`, `B` and `C` have weights", f"select_norm={mixer.select_norm!r}"
    )
