"""transformers' model type `jamba` without experts: Mamba-1 with norms of `dt`, `B` and `C`,
attention without positions, and an MLP in every block.

The defaults are those of `JambaConfig`.
"""

from ....models import AttentionConfig, LanguageModelConfig, Mamba1Config
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import D_MODEL, UNSCALED, dt_rank, gated_mlp as mlp_table, whole_expand
from .._names import mamba1, norm
from .._tables import JSON, Table, constant, fixed, flag, shared_eps, size
from ._family import Family, Kinds, Part, Pattern, model_rows
from ._hybrid import (
    HYBRID_IGNORED,
    USUAL_SCALE,
    attention_and,
    attention_layers,
    check_hybrid,
    heads,
)
from ._hybrid_names import LLAMA_NAMES, attention, gated_mlp


# Options of experts (the only supported number is 1) and of training, the choice of an
# implementation, and fields of older versions.
_IGNORED = HYBRID_IGNORED | set(
    """
    expert_layer_offset expert_layer_period num_experts_per_tok output_router_logits
    router_aux_loss_coef use_associative_scan use_mambapy calc_logits_for_entire_prompt n_ctx
    """.split()  # noqa: SIM905
)


def _read_pattern(fields: Fields) -> Kinds:
    n_layer = fields.layers("num_hidden_layers", 32)
    period = fields.size("attn_layer_period", 8)
    offset = fields.natural("attn_layer_offset", 4)
    if offset >= period:
        raise fields.error("attn_layer_offset", f"must be below attn_layer_period={period}")
    return attention_and("mamba")(range(offset, n_layer, period), n_layer)


def _find_period(kinds: Kinds) -> tuple[int, int] | None:
    """Returns the period and the offset of the attention layers, if they are periodic."""
    indices, n_layer = attention_layers(kinds), len(kinds)
    # The last period is longer than the model, which expresses a model without attention.
    for period in range(1, n_layer + 2):
        for offset in range(period):
            if indices == list(range(offset, n_layer, period)):
                return period, offset
    return None


def _write_pattern(kinds: Kinds) -> JSON:
    found = _find_period(kinds)
    assert found is not None  # As `_check_pattern` ensures.
    return {
        "num_hidden_layers": len(kinds),
        "attn_layer_period": found[0],
        "attn_layer_offset": found[1],
    }


def _check_pattern(kinds: Kinds) -> None:
    check_hybrid(kinds)
    if _find_period(kinds) is None:
        raise Unstorable(
            "attention beside Mamba-1 at irregular intervals "
            f"(in layers {attention_layers(kinds)} of {len(kinds)})"
        )


def _mamba(config: Mamba1Config) -> list[Slot]:
    slots = mamba1(config)
    for name, path in {"dt": "dt_norm", "b": "B_norm", "c": "C_norm"}.items():
        slots += norm(f"{name}_layernorm", path, rms_norm=True)
    return slots


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    d_model=4096,
    norm_eps=("rms_norm_eps", 1e-6),
    mixers={
        "mamba": Part(
            Table(
                Mamba1Config,
                (
                    D_MODEL,
                    fixed(
                        "select_norm",
                        "weighted",
                        "MLPs or attention beside Mamba-1 layers without norms of `dt`, `B` and "
                        "`C`",
                    ),
                    shared_eps("select_norm_eps"),
                    whole_expand("mamba_expand"),
                    size("mamba_d_state", "d_state", 16),
                    size("mamba_d_conv", "d_conv", 4),
                    dt_rank("mamba_dt_rank"),
                    flag("mamba_proj_bias", "bias", False),
                    flag("mamba_conv_bias", "conv_bias", True),
                    constant("mamba_inner_layernorms", True),
                ),
            ),
            _mamba,
            "mamba",
        ),
        "attention": Part(
            Table(
                AttentionConfig,
                (
                    D_MODEL,
                    *heads(nheads=32, nheads_kv=8),
                    USUAL_SCALE,
                    fixed("rotary_emb_dim", 0, "attention beside Mamba-1 with a rotary embedding"),
                    fixed("qkv_proj_bias", False, "attention beside Mamba-1 with biases"),
                    fixed("out_proj_bias", False, "attention beside Mamba-1 with biases"),
                    constant("sliding_window", None),
                ),
            ),
            attention,
            "self_attn",
            absent={"num_attention_heads": 1, "num_key_value_heads": 1},
        ),
    },
    mlps={
        "mlp": Part(
            mlp_table(size("intermediate_size", "d_intermediate", 14336)),
            gated_mlp,
            "feed_forward",
        )
    },
    pattern=Pattern(_read_pattern, _write_pattern, _check_pattern),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=65536, tie_embeddings=False, residual_in_fp32=False),
            *UNSCALED,
            constant("num_experts", 1, default=16, written=True),
        ),
        ignored=_IGNORED,
    ),
    names=LLAMA_NAMES,
)
