"""transformers' model type `bamba`: Mamba-2, attention, and an MLP in every block.

The defaults are those of `BambaConfig`.
"""

from ....models import AttentionConfig, LanguageModelConfig
from .._fields import Fields
from .._layout import Unstorable
from .._mixers import D_MODEL, UNSCALED, gated_mlp as mlp_table
from .._tables import JSON, Arguments, Row, RowInput, Shared, Table, constant, size
from ._family import Family, Kinds, Part, Pattern, model_rows
from ._hybrid import (
    ATTENTION_BIAS,
    BAMBA_MAMBA2,
    HYBRID_IGNORED,
    USUAL_SCALE,
    attention_layers,
    check_hybrid,
    heads,
    hybrid_kinds,
    read_rope,
)
from ._hybrid_names import LLAMA_NAMES, attention, gated_mlp


def _read_rotary(given: RowInput) -> Arguments:
    fields, headdim = given.fields, given.known["headdim"]
    base, share = read_rope(fields, 0.5)
    dim = int(headdim * share)
    if "attn_rotary_emb" in fields and fields.size("attn_rotary_emb") != dim:
        raise fields.error(
            "attn_rotary_emb", f"must be {share} of the {headdim} features of a head"
        )
    return {"rotary_emb_dim": dim, "rotary_emb_base": base}


def _write_rotary(config: AttentionConfig) -> JSON:
    # transformers rounds the product down. The last candidate always gives the right number.
    dim, headdim = config.rotary_emb_dim, config.headdim
    shares = (dim / headdim, (dim + 0.5) / headdim)
    rope = {
        "rope_type": "default",
        "rope_theta": config.rotary_emb_base,
        "partial_rotary_factor": next(s for s in shares if int(headdim * s) == dim),
    }
    return {"rope_parameters": rope}


def _check_rotary(config: AttentionConfig, _: Shared) -> None:
    if config.rotary_emb_dim == 0 or config.rotary_emb_interleaved:
        raise Unstorable(
            "attention beside Mamba-2 without a rotary embedding, or with an interleaved one "
            f"(rotary_emb_dim={config.rotary_emb_dim}, "
            f"rotary_emb_interleaved={config.rotary_emb_interleaved})"
        )


def _read_pattern(fields: Fields) -> Kinds:
    n_layer = fields.count("num_hidden_layers", 32)
    return hybrid_kinds(fields.indices("attn_layer_indices", n_layer), n_layer)


def _write_pattern(kinds: Kinds) -> JSON:
    return {"num_hidden_layers": len(kinds), "attn_layer_indices": attention_layers(kinds)}


BAMBA = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    d_model=4096,
    norm_eps=("rms_norm_eps", 1e-5),
    mixers={
        "mamba": BAMBA_MAMBA2,
        "attention": Part(
            Table(
                AttentionConfig,
                (
                    D_MODEL,
                    *heads(nheads=32, nheads_kv=8),
                    USUAL_SCALE,
                    ATTENTION_BIAS,
                    Row(_read_rotary, _write_rotary, _check_rotary),
                ),
            ),
            attention,
            "self_attn",
            # transformers builds a rotary embedding even if no layer has attention.
            absent={"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4},
        ),
    },
    mlps={
        "mlp": Part(
            mlp_table(size("intermediate_size", "d_intermediate", 14336)),
            gated_mlp,
            "feed_forward",
        )
    },
    pattern=Pattern(_read_pattern, _write_pattern, check_hybrid),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=128000, tie_embeddings=False, residual_in_fp32=False),
            *UNSCALED,
            constant("mlp_bias", False, written=True),
        ),
        # The coefficient is an option of the loss.
        ignored=HYBRID_IGNORED | {"z_loss_coefficient"},
    ),
    names=LLAMA_NAMES,
)
