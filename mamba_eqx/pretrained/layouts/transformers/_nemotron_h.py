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
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import D_MODEL, UNSCALED
from .._names import mamba2, within
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
    number,
    shared_eps,
    size,
)
from ._family import MAMBA_IGNORED, Family, Kind, Kinds, Part, Pattern, vocabulary
from ._hybrid import HYBRID_IGNORED, USUAL_SCALE, heads
from ._hybrid_names import attention, experts, mlp
from ._mamba import OFFICIAL_NAMES
from ._mamba2 import UNSUPPORTED


_MIXERS = {"mamba": "M", "attention": "*"}
_MLPS = {"mlp": "-", "moe": "E"}
# The letters of a pattern by the names that older and newer versions have for the layers.
_LETTERS = _MIXERS | _MLPS | {"linear_attention": "M", "full_attention": "*"}
# The prediction of several tokens at once, positions that no layer uses, and the choice of an
# implementation.
_IGNORED = HYBRID_IGNORED | set(
    """
    chunk_size expand hidden_dropout keep_mtp_spec_in_bf16 mamba_ssm_cache_dtype
    moe_shared_expert_overlap mtp_hybrid_override_pattern mtp_layers_block_type
    num_nextn_predict_layers output_router_logits partial_rotary_factor rope_theta
    """.split()  # noqa: SIM905
)
# The fields of experts, which configs of models without experts have as well.
_EXPERTS = frozenset(
    """
    mlp_bias moe_intermediate_size moe_latent_size moe_shared_expert_intermediate_size n_group
    n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok routed_scaling_factor
    topk_group
    """.split()  # noqa: SIM905
)


def _read_pattern(fields: Fields) -> Kinds:
    letters = fields.series("hybrid_override_pattern", {a: a for a in _LETTERS.values()})
    key = "layers_block_type" if letters is None else "hybrid_override_pattern"
    named = fields.series("layers_block_type", _LETTERS)
    if letters is None and named is None:
        raise fields.error("hybrid_override_pattern", "is required")
    if letters is not None and named is not None and letters != named:
        raise fields.error("layers_block_type", "must agree with `hybrid_override_pattern`")
    letters = letters or named or []
    if fields.layers("num_hidden_layers", len(letters)) != len(letters):
        raise fields.error("num_hidden_layers", f"must be the length of `{key}`, {len(letters)}")
    mixers, mlps = ({letter: name for name, letter in kinds.items()} for kinds in (_MIXERS, _MLPS))
    kinds: list[Kind] = []
    for i, letter in enumerate(letters):
        if letter in mixers:
            kinds.append(Kind(mixers[letter], None))
        elif kinds and kinds[-1].mlp is None:
            kinds[-1] = kinds[-1]._replace(mlp=mlps[letter])
        else:
            raise fields.error(key, f"must have a mixer directly before the MLP at index {i}")
    return kinds


def _write_pattern(kinds: Kinds) -> JSON:
    pattern = "".join(
        _MIXERS[kind.mixer] + ("" if kind.mlp is None else _MLPS[kind.mlp]) for kind in kinds
    )
    return {"num_hidden_layers": len(pattern), "hybrid_override_pattern": pattern}


def _places(kinds: Kinds) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    for kind in kinds:
        mixer = places[-1][1] + 1 if places else 0
        places.append((mixer, mixer if kind.mlp is None else mixer + 1))
    return places


def _read_width(given: RowInput) -> Arguments:
    # Other than in Mamba-2 and Bamba, the width is no multiple of `hidden_size`.
    nheads = given.fields.size("mamba_num_heads", 128)
    headdim = given.fields.size("mamba_head_dim", 64)
    return {"d_inner": nheads * headdim, "headdim": headdim}


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
    if "head_dim" in fields and old != headdim:
        raise fields.error("attention_head_dim", f"must be head_dim={headdim}")
    return {"headdim": old}


def _read_eps(given: RowInput) -> Arguments:
    # Other names of `layer_norm_epsilon` for other readers.
    for key in ("rms_norm_eps", "norm_eps"):
        if given.fields.number(key, given.shared.norm_eps) != given.shared.norm_eps:
            raise given.fields.error(key, f"must be layer_norm_epsilon={given.shared.norm_eps}")
    return {}


def _check_shared(config: MixtureOfExpertsConfig, _: Shared) -> None:
    if config.d_shared is None:
        raise Unstorable("experts of Nemotron-H without a shared expert (d_shared=None)")


def _read_latent(given: RowInput) -> Arguments:
    key = "moe_latent_size"
    return {"d_latent": None if given.fields.get(key, None) is None else given.fields.size(key)}


def _write_latent(config: MixtureOfExpertsConfig) -> JSON:
    return {} if config.d_latent is None else {"moe_latent_size": config.d_latent}


def _check_biases(config: LanguageModelConfig, _: Shared) -> None:
    mlps = [layer.mlp for layer in config.layers]
    experts = any(isinstance(one, MixtureOfExpertsConfig) for one in mlps)
    if experts and any(isinstance(one, MLPConfig) and one.bias for one in mlps):
        # The field `mlp_bias` concerns the shared expert as well.
        raise Unstorable("MLPs with biases beside experts of Nemotron-H (bias=True)")


def _mixture(config: MixtureOfExpertsConfig) -> list[Slot]:
    one = [Slot("up_proj.weight", "fc1"), Slot("down_proj.weight", "fc2")]
    slots = [
        Slot("gate.weight", "router.weight"),
        Slot("gate.e_score_correction_bias", "router.correction_bias"),
        *experts(one, config.n_experts),
    ]
    if config.d_shared is not None:
        slots += within(mlp(MLPConfig(config.d_shared)), "shared_experts", "shared")
    if config.d_latent is not None:
        slots += [
            Slot(f"{name}_latent_proj.weight", f"{name}_latent.weight") for name in ("fc1", "fc2")
        ]
    return slots


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
                    Row(lambda given: {}, _write_floor),
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
                    Row(_read_headdim, lambda config: {}),
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
        "moe": Part(
            Table(
                MixtureOfExpertsConfig,
                (
                    size("n_routed_experts", "n_experts", 8),
                    size("num_experts_per_tok", "top_k", 2),
                    size("moe_intermediate_size", "d_intermediate", 7688),
                    size("moe_shared_expert_intermediate_size", "d_shared", 7688),
                    Row(lambda given: {}, lambda config: {}, _check_shared),
                    constant("n_shared_experts", 1, written=True),
                    Row(_read_latent, _write_latent),
                    fixed("routing", "sigmoid", "experts of Nemotron-H with another routing"),
                    size("n_group", "n_group", 1),
                    size("topk_group", "topk_group", 1),
                    flag("norm_topk_prob", "renormalise", True),
                    number("routed_scaling_factor", "scaling", 1.0),
                    fixed("gated", False, "gated experts of Nemotron-H"),
                    constant("mlp_bias", False, written=True),
                ),
            ),
            _mixture,
            "mixer",
            unused=_EXPERTS,
        ),
    },
    # Every sequence of kinds has a pattern.
    pattern=Pattern(_read_pattern, _write_pattern, lambda kinds: None),
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
            Row(_read_eps, lambda config: {}),
            Row(lambda given: {}, lambda config: {}, _check_biases),
            *UNSCALED,
        ),
        ignored=_IGNORED,
    ),
    names=replace(
        OFFICIAL_NAMES,
        norm2="norm",
        places=_places,
        # The names in transformers' own modules.
        older={**OFFICIAL_NAMES.older, "model.": "backbone."},
        # The layers that predict several tokens at once.
        ignored=("mtp.",),
    ),
)
