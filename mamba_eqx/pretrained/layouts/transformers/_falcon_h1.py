"""transformers' model type `falcon_h1`: Mamba-2 and attention side by side in every layer, a gated
MLP, and multipliers.

The defaults are those of `FalconH1Config`.

The file has multipliers of inputs that the config lacks, because other multipliers contain them
without loss: `ssm_in_multiplier` is a factor of all `ssm_multipliers`; attention multiplies
queries, keys and values by `attention_in_multiplier`, so the softmax scale contains its square, and
the scale of attention's output contains the third factor. Biases would not be multiplied, so
multipliers of inputs are refused beside them. Written files have multipliers of inputs of 1.
"""

from ....models import (
    AttentionConfig,
    GatedMLPConfig,
    LanguageModelConfig,
    Mamba2Config,
    ParallelConfig,
)
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import D_MODEL, layer_kind
from .._names import mamba2, within
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Shared,
    Table,
    constant,
    flag,
    inverse,
    number,
    shared_eps,
    size,
)
from ._family import Family, Kind, Part, equal_layers, model_rows
from ._hybrid import ATTENTION_BIAS, HYBRID_IGNORED, WHOLE_ROPE, heads, mamba2_sizes
from ._hybrid_names import LLAMA_NAMES, attention, gated_mlp
from ._mamba2 import NEVER_SUPPORTED


# Our own field for a softmax scale that no `key_multiplier` gives exactly.
_SOFTMAX_SCALE = "softmax_scale"


def _read_input_multiplier(fields: Fields, key: str, *, bias: bool) -> float:
    multiplier = fields.number(key, 1.0)
    if bias and multiplier != 1:
        raise fields.error(key, "must be 1 in a model whose projections have biases")
    return multiplier


def _read_width(given: RowInput) -> Arguments:
    # `mamba_expand` has no influence beside `mamba_d_ssm`.
    expanded = given.fields.multiple_of(given.shared.d_model, "mamba_expand", 2)
    if given.fields.get("mamba_d_ssm", 1024) is None:
        return {"d_inner": expanded}
    return {"d_inner": given.fields.size("mamba_d_ssm", 1024)}


def _read_mamba_bias(given: RowInput) -> Arguments:
    fields = given.fields
    bias = fields.flag("mamba_proj_bias", False)
    if fields.flag("projectors_bias", False) != bias:
        raise fields.error("projectors_bias", f"must be mamba_proj_bias={bias}")
    return {"bias": bias}


def _read_norm(given: RowInput) -> Arguments:
    rms_norm = given.fields.flag("mamba_rms_norm", False)
    before = given.fields.flag("mamba_norm_before_gate", True)
    return {
        "rms_norm": rms_norm,
        "norm_before_gate": rms_norm and before,
        "norm_eps": given.shared.norm_eps,
    }


def _check_norm(config: Mamba2Config, shared: Shared) -> None:
    if config.rms_norm:
        shared_eps().check(config, shared)


def _read_ssm_multipliers(given: RowInput) -> Arguments:
    fields, bias = given.fields, given.known["bias"]
    of_input = _read_input_multiplier(fields, "ssm_in_multiplier", bias=bias)
    return {"ssm_multipliers": tuple(of_input * m for m in fields.numbers("ssm_multipliers", 5))}


_MAMBA2 = Table(
    Mamba2Config,
    (
        D_MODEL,
        Row(_read_width, lambda config: {"mamba_d_ssm": config.d_inner}),
        *NEVER_SUPPORTED,
        *mamba2_sizes("mamba_d_ssm (if null, hidden_size * mamba_expand)"),
        Row(
            _read_mamba_bias,
            lambda config: {"mamba_proj_bias": config.bias, "projectors_bias": config.bias},
        ),
        Row(
            _read_norm,
            lambda config: {
                "mamba_rms_norm": config.rms_norm,
                "mamba_norm_before_gate": config.norm_before_gate,
            },
            _check_norm,
        ),
        Row(
            _read_ssm_multipliers,
            lambda config: {
                "ssm_in_multiplier": 1.0,
                "ssm_multipliers": list(config.ssm_multipliers),
            },
        ),
    ),
    # The chunk size does not affect the result.
    ignored=("mamba_chunk_size",),
)


def _read_scale(given: RowInput) -> Arguments:
    fields, headdim, bias = given.fields, given.known["headdim"], given.known["qkv_proj_bias"]
    of_input = _read_input_multiplier(fields, "attention_in_multiplier", bias=bias)
    # In this order, because the second factor alone gives the same number in a written file.
    scale = (of_input * of_input * fields.number("key_multiplier", 1.0)) * headdim**-0.5
    meaning = "attention_in_multiplier**2 * key_multiplier / sqrt(head_dim)"
    return {"softmax_scale": fields.refined(_SOFTMAX_SCALE, scale, meaning)}


def _write_scale(config: AttentionConfig) -> JSON:
    scale, usual = config.softmax_scale, config.headdim**-0.5
    multiplier = inverse(lambda multiplier: multiplier * usual, scale, scale / usual)
    if multiplier is None:
        return {"key_multiplier": scale / usual, _SOFTMAX_SCALE: scale}
    return {"key_multiplier": multiplier}


_ATTENTION = Table(
    AttentionConfig,
    (
        D_MODEL,
        *heads(nheads=32, nheads_kv=8),
        ATTENTION_BIAS,
        WHOLE_ROPE,
        Row(_read_scale, _write_scale),
    ),
)


def _side_by_side(config: ParallelConfig) -> tuple[Mamba2Config, AttentionConfig]:
    """Returns the two mixers of a layer.

    **Raises:** `Unstorable` if they are of other kinds.
    """
    match config.mixers:
        case (Mamba2Config() as mamba, AttentionConfig() as attn):
            return mamba, attn
    raise Unstorable(
        "mixers side by side other than Mamba2 and Attention, in this order "
        f"({', '.join(map(layer_kind, config.mixers))})"
    )


def _read_mixers(given: RowInput) -> Arguments:
    fields, shared = given.fields, given.shared
    return {"mixers": (_MAMBA2.read(fields, shared), _ATTENTION.read(fields, shared))}


def _write_mixers(config: ParallelConfig) -> JSON:
    mamba, attn = _side_by_side(config)
    return _MAMBA2.write(mamba) | _ATTENTION.write(attn)


def _check_mixers(config: ParallelConfig, shared: Shared) -> None:
    mamba, attn = _side_by_side(config)
    _MAMBA2.check(mamba, shared)
    _ATTENTION.check(attn, shared)


def _read_scales(given: RowInput) -> Arguments:
    of_attention = given.fields.number("attention_in_multiplier", 1.0)
    of_attention *= given.fields.number("attention_out_multiplier", 1.0)
    return {"scales": (given.fields.number("ssm_out_multiplier", 1.0), of_attention)}


def _write_scales(config: ParallelConfig) -> JSON:
    of_mamba, of_attention = config.scales
    return {
        "ssm_out_multiplier": of_mamba,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": of_attention,
    }


def _mixer_slots(config: ParallelConfig) -> list[Slot]:
    mamba, attn = _side_by_side(config)
    return [
        *within(mamba2(mamba), "mamba", "layers.0"),
        *within(attention(attn), "self_attn", "layers.1"),
    ]


def _read_mlp_multipliers(given: RowInput) -> Arguments:
    gate, out = given.fields.numbers("mlp_multipliers", 2)
    return {"gate_multiplier": gate, "out_multiplier": out}


def _write_mlp_multipliers(config: GatedMLPConfig) -> JSON:
    return {"mlp_multipliers": [config.gate_multiplier, config.out_multiplier]}


FALCON_H1 = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    d_model=4096,
    norm_eps=("rms_norm_eps", 1e-5),
    mixers={
        "parallel": Part(
            Table(
                ParallelConfig,
                (
                    Row(_read_mixers, _write_mixers, _check_mixers),
                    Row(_read_scales, _write_scales),
                ),
            ),
            _mixer_slots,
        )
    },
    mlps={
        "mlp": Part(
            Table(
                GatedMLPConfig,
                (
                    size("intermediate_size", "d_intermediate", 14336),
                    flag("mlp_bias", "bias", False),
                    Row(_read_mlp_multipliers, _write_mlp_multipliers),
                ),
            ),
            gated_mlp,
            "feed_forward",
        )
    },
    pattern=equal_layers(Kind("parallel", "mlp"), n_layer=32),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=128000, tie_embeddings=False, residual_in_fp32=False),
            number("embedding_multiplier", "embedding_multiplier", 1.0),
            number("lm_head_multiplier", "logits_multiplier", 1.0),
            constant("attn_layer_indices", None),
            constant("mamba_use_mlp", True),
        ),
        # Published configs have the factor, which nothing reads.
        ignored=HYBRID_IGNORED | {"mlp_expansion_factor"},
    ),
    names=LLAMA_NAMES,
)
