"""transformers' model type `nemotron_h`: Mamba-2, attention without positions, MLPs and experts.

A layer of the file is a mixer or an MLP, each after a norm of its own. A mixer and the MLP that
follows are one block here. The defaults are those of `NemotronHConfig`.
"""

from dataclasses import replace

from ....models import (
    AttentionConfig,
    LanguageModelConfig,
    Mamba2Config,
    MixtureOfExpertsConfig,
    MLPConfig,
)
from .._layout import Unstorable
from .._mixers import D_MODEL, UNSCALED
from .._names import mamba2
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Shared,
    Table,
    constant,
    fixed,
    flag,
    limit,
    shared_eps,
    size,
)
from ._family import MAMBA_IGNORED, Family, Part, vocabulary
from ._hybrid import HYBRID_IGNORED, ROPE_FIELDS, USUAL_SCALE, heads
from ._hybrid_names import attention, mlp
from ._mamba import OFFICIAL_NAMES
from ._mamba2 import UNSUPPORTED
from ._nemotron_experts import EXPERTS
from ._nemotron_pattern import PATTERN, places


# The prediction of several tokens at once, positions that no layer uses, and the choice of an
# implementation.
_IGNORED = (
    HYBRID_IGNORED
    | ROPE_FIELDS
    | set(
        """
    chunk_size expand hidden_dropout keep_mtp_spec_in_bf16 mamba_ssm_cache_dtype
    moe_shared_expert_overlap mtp_hybrid_override_pattern mtp_layers_block_type
    num_nextn_predict_layers output_router_logits
    """.split()  # noqa: SIM905
    )
)


def _read_width(given: RowInput) -> Arguments:
    # Unlike in Mamba-2 and Bamba, the width need not be a multiple of `hidden_size`.
    headdim = given.fields.size("mamba_head_dim", 64)
    given.fields.size("mamba_num_heads", 128)  # Checks that the number is an integer.
    d_inner = given.fields.multiple_of(headdim, "mamba_num_heads", 128)
    return {"d_inner": d_inner, "headdim": headdim}


def _write_width(config: Mamba2Config) -> JSON:
    nheads = config.d_inner // config.headdim
    return {"mamba_num_heads": nheads, "mamba_head_dim": config.headdim}


def _write_floor(config: Mamba2Config) -> JSON:
    # transformers takes this number, meant for the initialisation, for the lower limit of `dt`, and
    # ignores `time_step_limit` (issue 48989). The logarithm of the number must be finite.
    return {"time_step_min": config.dt_limit[0] or 1e-30}


def _read_headdim(given: RowInput) -> Arguments:
    # The name of `head_dim` in the first configs.
    fields, headdim = given.fields, given.known["headdim"]
    old = fields.optional_size("attention_head_dim", headdim)
    if fields.get("head_dim", None) is not None and old != headdim:
        raise fields.error("attention_head_dim", f"must be head_dim={headdim}")
    return {"headdim": old}


def _read_eps(given: RowInput) -> Arguments:
    # Other names of `layer_norm_epsilon` for other readers.
    for key in ("rms_norm_eps", "norm_eps"):
        if given.fields.number(key, given.shared.norm_eps) != given.shared.norm_eps:
            raise given.fields.error(key, f"must be layer_norm_epsilon={given.shared.norm_eps}")
    return {}


def _check_biases(config: LanguageModelConfig, _: Shared) -> None:
    mlps = [layer.mlp for layer in config.layers]
    experts = any(isinstance(one, MixtureOfExpertsConfig) for one in mlps)
    if experts and any(isinstance(one, MLPConfig) and one.bias for one in mlps):
        # The field `mlp_bias` concerns the shared expert as well.
        raise Unstorable("MLPs with biases beside experts of Nemotron-H (bias=True)")


NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    d_model=4096,
    norm_eps=("layer_norm_epsilon", 1e-5),
    mixers={
        "mamba": Part(
            Table(
                Mamba2Config,
                (
                    D_MODEL,
                    Row(_read_width, _write_width),
                    *UNSUPPORTED,
                    size("n_groups", "ngroups", 8),
                    size("ssm_state_size", "d_state", 128),
                    size("conv_kernel", "d_conv", 4),
                    flag("use_bias", "bias", False),
                    flag("use_conv_bias", "conv_bias", True),
                    # Neither transformers nor the original code reads the field.
                    constant("mamba_proj_bias", False),
                    limit("time_step_limit", "dt_limit"),
                    Row(write=_write_floor),
                    shared_eps(),
                ),
                ignored=MAMBA_IGNORED,
            ),
            mamba2,
            "mixer",
        ),
        "attention": Part(
            Table(
                AttentionConfig,
                (
                    D_MODEL,
                    *heads(nheads=32, nheads_kv=8, headdim=128),
                    USUAL_SCALE,
                    Row(_read_headdim),
                    fixed("rotary_emb_dim", 0, "attention with a rotary embedding"),
                    # transformers ignores the field, and never has biases.
                    constant("attention_bias", False),
                    fixed("qkv_proj_bias", False, "attention with biases"),
                    fixed("out_proj_bias", False, "attention with biases"),
                    constant("sliding_window", None),
                ),
            ),
            attention,
            "mixer",
        ),
    },
    mlps={
        "mlp": Part(
            Table(
                MLPConfig,
                (
                    size("intermediate_size", "d_intermediate", 21504),
                    flag("mlp_bias", "bias", False),
                ),
            ),
            mlp,
            "mixer",
            unused={"intermediate_size", "mlp_bias"},
        ),
        "moe": EXPERTS,
    },
    pattern=PATTERN,
    model=Table(
        LanguageModelConfig,
        (
            vocabulary(131072),
            # transformers ignores the field, and never ties the two.
            constant("tie_word_embeddings", False, written=True),
            fixed("tie_embeddings", False, "models of Nemotron-H with tied embeddings"),
            flag("residual_in_fp32", "residual_in_fp32", False),
            constant("mamba_hidden_act", "silu", written=True),
            constant("mlp_hidden_act", "relu2", written=True),
            Row(_read_eps),
            Row(check=_check_biases),
            *UNSCALED,
        ),
        ignored=_IGNORED,
    ),
    names=replace(
        OFFICIAL_NAMES,
        norm2="norm",
        places=places,
        # The names in transformers' own modules.
        older={**OFFICIAL_NAMES.older, "model.": "backbone."},
        modules={"backbone.": "model."},
        # The layers that predict several tokens at once.
        ignored=("mtp.",),
    ),
)
