"""transformers' model type `granitemoehybrid`: Mamba-2, attention with or without positions, in
every block a gated MLP or a mixture of experts with a shared expert, and multipliers.

The defaults are those of `GraniteMoeHybridConfig`.
"""

from dataclasses import replace

from ....models import AttentionConfig, LanguageModelConfig
from .._fields import Fields
from .._layout import Unstorable
from .._mixers import D_MODEL
from .._tables import JSON, Arguments, Row, RowInput, Shared, Table, constant, inverse, number
from ._family import Family, Kind, Kinds, Names, Part, Pattern, model_rows
from ._granite_mlps import EXPERTS, IN_MEMORY, MLP
from ._hybrid import (
    ATTENTION_BIAS,
    BAMBA_MAMBA2,
    HYBRID_IGNORED,
    ROPE_FIELDS,
    WHOLE_ROPE,
    attention_layers,
    check_mlps,
    heads,
)
from ._hybrid_names import attention


# Options of training.
_IGNORED = HYBRID_IGNORED | {"init_method", "output_router_logits", "router_aux_loss_coef"}
# Our own field for a `logits_multiplier` that is the reciprocal of no number. See
# `_write_logits_scaling`.
_LOGITS_MULTIPLIER = "logits_multiplier"


def _read_position(given: RowInput) -> Arguments:
    fields = given.fields
    if fields.only("position_embedding_type", [None, "nope", "rope"], None) != "rope":
        fields.ignore(ROPE_FIELDS)
        return {"rotary_emb_dim": 0}
    return WHOLE_ROPE.read(given)


def _write_position(config: AttentionConfig) -> JSON:
    if config.rotary_emb_dim == 0:
        return {"position_embedding_type": "nope"}
    return {"position_embedding_type": "rope", **WHOLE_ROPE.write(config)}


def _check_position(config: AttentionConfig, shared: Shared) -> None:
    if config.rotary_emb_dim != 0:
        WHOLE_ROPE.check(config, shared)


def _check_headdim(config: AttentionConfig, _: Shared) -> None:
    # transformers checks this for a rotary embedding, even if there is none.
    if config.headdim % 2:
        raise Unstorable(f"attention with an odd number of features per head ({config.headdim})")


def _read_logits_scaling(given: RowInput) -> Arguments:
    near = 1 / given.fields.number("logits_scaling", 1.0)
    return {
        "logits_multiplier": given.fields.refined(_LOGITS_MULTIPLIER, near, "1 / logits_scaling")
    }


def _write_logits_scaling(config: LanguageModelConfig) -> JSON:
    multiplier, near = config.logits_multiplier, 1 / config.logits_multiplier
    divisor = inverse(lambda divisor: 1 / divisor, multiplier, near)
    if divisor is None:
        return {"logits_scaling": near, _LOGITS_MULTIPLIER: multiplier}
    return {"logits_scaling": divisor}


# The names of transformers 4, which version 5 reads as well, and those of version 5.
_MAMBA_LAYERS = ("mamba", "linear_attention")
_ATTENTION_LAYERS = ("attention", "full_attention")


def _read_pattern(fields: Fields) -> Kinds:
    n_layer = fields.count("num_hidden_layers", 32)
    types = fields.get("layer_types", None)
    types = [_MAMBA_LAYERS[0]] * n_layer if types is None else types
    known = (*_MAMBA_LAYERS, *_ATTENTION_LAYERS)
    if (
        not isinstance(types, list)
        or len(types) != n_layer
        or any(not isinstance(kind, str) or kind not in known for kind in types)
    ):
        raise fields.error(
            "layer_types",
            f'must be a list of num_hidden_layers={n_layer} times "mamba" or "attention"',
        )
    mlp = "mlp" if fields.natural("num_local_experts", 8) == 0 else "experts"
    return [Kind("attention" if kind in _ATTENTION_LAYERS else "mamba", mlp) for kind in types]


def _write_pattern(kinds: Kinds) -> JSON:
    indices = attention_layers(kinds)
    types = [_ATTENTION_LAYERS[0] if i in indices else _MAMBA_LAYERS[0] for i in range(len(kinds))]
    return {"num_hidden_layers": len(kinds), "layer_types": types}


def _check_pattern(kinds: Kinds) -> None:
    check_mlps(kinds)
    if len({kind.mlp for kind in kinds}) > 1:
        raise Unstorable("experts in some of the layers only")


GRANITE = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    d_model=4096,
    norm_eps=("rms_norm_eps", 1e-6),
    mixers={
        # transformers checks the number of heads even if no layer is Mamba-2.
        "mamba": replace(
            BAMBA_MAMBA2,
            absent={"mamba_n_heads": 1},
            unused="""
            mamba_n_heads mamba_d_head mamba_expand mamba_n_groups mamba_d_state mamba_d_conv
            mamba_proj_bias mamba_conv_bias time_step_limit
            """.split(),  # noqa: SIM905
        ),
        "attention": Part(
            Table(
                AttentionConfig,
                (
                    D_MODEL,
                    *heads(nheads=32, nheads_kv=None),
                    ATTENTION_BIAS,
                    number("attention_multiplier", "softmax_scale", 1.0),
                    Row(_read_position, _write_position, _check_position),
                    Row(check=_check_headdim),
                ),
            ),
            attention,
            "self_attn",
            absent={"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4},
        ),
    },
    mlps={"mlp": MLP, "experts": EXPERTS},
    pattern=Pattern(_read_pattern, _write_pattern, _check_pattern),
    block=(number("residual_multiplier", "residual_multiplier", 1.0),),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=32000, tie_embeddings=False, residual_in_fp32=False),
            number("embedding_multiplier", "embedding_multiplier", 1.0),
            Row(_read_logits_scaling, _write_logits_scaling),
            constant("normalization_function", "rmsnorm"),
            constant("mlp_bias", False),
        ),
        ignored=_IGNORED,
    ),
    names=Names(
        embedding="model.embed_tokens.weight",
        norm_f="model.norm",
        norm2="post_attention_layernorm",
        older=IN_MEMORY,
    ),
)
