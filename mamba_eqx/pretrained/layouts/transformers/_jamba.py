"""transformers' model type `jamba` without experts: Mamba-1 with norms of `dt`, `B` and `C`,
attention without positions, and an MLP in every block.

The defaults are those of `JambaConfig`.
"""

from collections.abc import Collection

from ....models import AttentionConfig, LanguageModelConfig, Mamba1Config
from .._fields import Fields
from .._layout import Unstorable
from .._mixers import D_MODEL, dt_rank, whole_expand
from .._tables import JSON, Table, constant, fixed, flag, shared_eps, size
from ._family import Family, Hybrid, Pattern, model_rows
from ._hybrid import HYBRID_IGNORED, heads
from ._hybrid_names import EMBEDDING, hybrid_model


# Options of experts (the only supported number is 1) and of training, the choice of an
# implementation, and fields of older versions.
_IGNORED = HYBRID_IGNORED | set(
    """
    expert_layer_offset expert_layer_period num_experts_per_tok output_router_logits
    router_aux_loss_coef use_associative_scan use_mambapy calc_logits_for_entire_prompt n_ctx
    """.split()  # noqa: SIM905
)


def _read_period(fields: Fields, n_layer: int) -> Collection[int]:
    period = fields.size("attn_layer_period", 8)
    offset = fields.natural("attn_layer_offset", 4)
    if offset >= period:
        raise fields.error("attn_layer_offset", f"must be below attn_layer_period={period}")
    return range(offset, n_layer, period)


def _find_period(indices: Collection[int], n_layer: int) -> tuple[int, int] | None:
    """Returns the period and the offset of the attention layers, if they are periodic."""
    # The last period is longer than the model, which expresses a model without attention.
    for period in range(1, n_layer + 2):
        for offset in range(period):
            if list(indices) == list(range(offset, n_layer, period)):
                return period, offset
    return None


def _write_period(indices: Collection[int], n_layer: int) -> JSON:
    found = _find_period(indices, n_layer)
    assert found is not None  # As `_check_period` ensures.
    return {"attn_layer_period": found[0], "attn_layer_offset": found[1]}


def _check_period(indices: Collection[int], n_layer: int) -> None:
    if _find_period(indices, n_layer) is None:
        raise Unstorable(
            "attention beside Mamba-1 at irregular intervals "
            f"(in layers {list(indices)} of {n_layer})"
        )


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    d_model=4096,
    n_layer=32,
    norm_eps=("rms_norm_eps", 1e-6),
    mixer=Table(
        Mamba1Config,
        (
            D_MODEL,
            fixed(
                "select_norm",
                "weighted",
                "MLPs or attention beside Mamba-1 layers without norms of `dt`, `B` and `C`",
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
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=65536, tie_embeddings=False, residual_in_fp32=False),
            constant("num_experts", 1, default=16, written=True),
        ),
        ignored=_IGNORED,
    ),
    slots=hybrid_model,
    embedding=EMBEDDING,
    hybrid=Hybrid(
        attention=Table(
            AttentionConfig,
            (
                D_MODEL,
                *heads(nheads=32, nheads_kv=8),
                fixed("rotary_emb_dim", 0, "attention beside Mamba-1 with a rotary embedding"),
                fixed("qkv_proj_bias", False, "attention beside Mamba-1 with biases"),
                fixed("out_proj_bias", False, "attention beside Mamba-1 with biases"),
                constant("sliding_window", None),
            ),
        ),
        pattern=Pattern(_read_period, _write_period, _check_period),
        intermediate_size=14336,
        no_attention={"num_attention_heads": 1, "num_key_value_heads": 1},
    ),
)
