"""transformers' model type `mamba2`."""

import math
from typing import Any

from ....models import BlockConfig, LanguageModelConfig, Mamba2Config
from .._fields import Fields, limit_to_json
from ._common import MAMBA_IGNORED, inexpressible, read_model


# The chunks of an implementation do not matter, and transformers computes the size
# `intermediate_size` and the rank `time_step_rank` as it likes: the former as `expand` says, the
# latter not at all. Old versions wrote the norms' options, and never read them.
_MAMBA2_IGNORED = MAMBA_IGNORED | {
    "chunk_size",
    "intermediate_size",
    "norm_before_gate",
    "rms_norm",
    "time_step_rank",
}


def read_mamba2(fields: Fields) -> LanguageModelConfig:
    # The defaults are those of transformers' `Mamba2Config`.
    d_model = fields.size("hidden_size", 4096)
    fields.size("expand", 2)  # Only an integer will do.
    nheads, headdim = fields.size("num_heads", 128), fields.size("head_dim", 64)
    d_inner = fields.multiple_of(d_model, "expand", 2)
    if nheads * headdim != d_inner:
        raise fields.error(
            "num_heads",
            f"times head_dim={headdim} must be hidden_size * expand = {d_inner}",
        )
    fields.only("hidden_act", ["silu"], "silu")
    eps = fields.number("layer_norm_epsilon", 1e-5)
    mixer = Mamba2Config(
        d_model=d_model,
        d_inner=d_inner,
        d_state=fields.size("state_size", 128),
        d_conv=fields.size("conv_kernel", 4),
        headdim=headdim,
        ngroups=fields.size("n_groups", 8),
        dt_limit=fields.limit("time_step_limit"),
        bias=fields.flag("use_bias", False),
        conv_bias=fields.flag("use_conv_bias", True),
        norm_eps=eps,
    )
    config = read_model(
        fields,
        (BlockConfig(mixer, norm_eps=eps),) * fields.layers("num_hidden_layers", 64),
        vocab_size=32768,
        norm_eps=eps,
        tie_embeddings=False,
        residual_in_fp32=True,
    )
    fields.ignore(_MAMBA2_IGNORED)
    return config


def check_mamba2(config: LanguageModelConfig, mixer: Mamba2Config) -> None:
    """**Raises:** `CheckpointError` for a mixer that transformers does not have."""
    if mixer.d_inner % mixer.d_model:
        raise inexpressible(
            "`d_inner` is not a multiple of `d_model`",
            f"d_inner={mixer.d_inner} and d_model={mixer.d_model}",
        )
    if mixer.d_ssm != mixer.d_inner:
        raise inexpressible(
            "mixers give channels to an MLP", f"d_ssm={mixer.d_ssm} and d_inner={mixer.d_inner}"
        )
    if mixer.D_has_hdim:
        raise inexpressible("skip connections have a weight per channel", "D_has_hdim=True")
    if not mixer.rms_norm:
        raise inexpressible("mixers have no norm", "rms_norm=False")
    if mixer.norm_before_gate:
        raise inexpressible("mixers have the norm before the gate", "norm_before_gate=True")
    if mixer.norm_eps != config.norm_eps:
        raise inexpressible(
            "norms differ in `norm_eps`",
            f"{mixer.norm_eps} in the mixers and {config.norm_eps} outside",
        )


def write_mamba2(config: LanguageModelConfig, mixer: Mamba2Config) -> dict[str, Any]:
    check_mamba2(config, mixer)
    fields = {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "expand": mixer.d_inner // mixer.d_model,
        "num_heads": mixer.d_inner // mixer.headdim,
        "head_dim": mixer.headdim,
        "n_groups": mixer.ngroups,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }
    if mixer.dt_limit != (0, math.inf):
        fields["time_step_limit"] = limit_to_json(mixer.dt_limit)
    return fields
