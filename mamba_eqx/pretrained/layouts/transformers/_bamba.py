"""transformers' model type `bamba`: Mamba-2, attention, and an MLP in every block.

The defaults are those of `BambaConfig`.
"""

from ....models import AttentionConfig, LanguageModelConfig, Mamba2Config
from .._fields import Fields
from .._layout import Unstorable
from .._mixers import D_MODEL, UNSCALED, gated_mlp as mlp_table, whole_expand
from .._names import mamba2
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Shared,
    Table,
    constant,
    flag,
    limit,
    shared_eps,
    size,
)
from ._family import Family, Kinds, Part, Pattern, model_rows
from ._hybrid import (
    HYBRID_IGNORED,
    attention_and,
    attention_layers,
    check_hybrid,
    heads,
)
from ._hybrid_names import LLAMA_NAMES, attention, gated_mlp
from ._mamba2 import UNSUPPORTED


_PARTIAL = 0.5  # The default for the share of a head that is rotated.


def _read_mamba_heads(given: RowInput) -> Arguments:
    fields, d_inner = given.fields, given.known["d_inner"]
    nheads = fields.size("mamba_n_heads", 128)
    if fields.get("mamba_d_head", "auto") == "auto":
        headdim = max(1, d_inner // nheads)
    else:
        headdim = fields.size("mamba_d_head")
    if nheads * headdim != d_inner:
        raise fields.error(
            "mamba_n_heads",
            f"times {headdim} per head must be hidden_size * mamba_expand = {d_inner}",
        )
    return {"headdim": headdim}


def _write_mamba_heads(config: Mamba2Config) -> JSON:
    return {"mamba_n_heads": config.d_inner // config.headdim, "mamba_d_head": config.headdim}


def _read_bias(given: RowInput) -> Arguments:
    bias = given.fields.flag("attention_bias", False)
    return {"qkv_proj_bias": bias, "out_proj_bias": bias}


def _write_bias(config: AttentionConfig) -> JSON:
    return {"attention_bias": config.qkv_proj_bias}


def _check_bias(config: AttentionConfig, _: Shared) -> None:
    if config.qkv_proj_bias != config.out_proj_bias:
        raise Unstorable(
            "attention with a bias in one projection only "
            f"(qkv_proj_bias={config.qkv_proj_bias}, out_proj_bias={config.out_proj_bias})"
        )


def _read_rotary(given: RowInput) -> Arguments:
    fields, headdim = given.fields, given.known["headdim"]
    # Older configs have the base at the top level, and a share that transformers never reads.
    base, partial = fields.number("rope_theta", 10000.0), _PARTIAL
    fields.only("partial_rotary_factor", [_PARTIAL], _PARTIAL)
    fields.only("rope_scaling", [None], None)
    parameters = fields.get("rope_parameters", None)
    if parameters is not None:
        rope = Fields(parameters, "`rope_parameters`")
        rope.only("rope_type", ["default"], "default")
        base = rope.number("rope_theta", base)
        partial = rope.number("partial_rotary_factor", partial)
        rope.finish()
    dim = int(headdim * partial)
    if "attn_rotary_emb" in fields and fields.size("attn_rotary_emb") != dim:
        raise fields.error(
            "attn_rotary_emb", f"must be {partial} of the {headdim} features of a head"
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
    n_layer = fields.layers("num_hidden_layers", 32)
    return attention_and("mamba")(fields.indices("attn_layer_indices", n_layer), n_layer)


def _write_pattern(kinds: Kinds) -> JSON:
    return {"num_hidden_layers": len(kinds), "attn_layer_indices": attention_layers(kinds)}


BAMBA = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    d_model=4096,
    norm_eps=("rms_norm_eps", 1e-5),
    mixers={
        "mamba": Part(
            Table(
                Mamba2Config,
                (
                    D_MODEL,
                    whole_expand("mamba_expand"),
                    *UNSUPPORTED,
                    Row(_read_mamba_heads, _write_mamba_heads),
                    size("mamba_n_groups", "ngroups", 1),
                    size("mamba_d_state", "d_state", 256),
                    size("mamba_d_conv", "d_conv", 4),
                    flag("mamba_proj_bias", "bias", False),
                    flag("mamba_conv_bias", "conv_bias", True),
                    limit("time_step_limit", "dt_limit"),
                    shared_eps(),
                ),
                # The chunk size does not affect the result.
                ignored=("mamba_chunk_size",),
            ),
            mamba2,
            "mamba",
        ),
        "attention": Part(
            Table(
                AttentionConfig,
                (
                    D_MODEL,
                    *heads(nheads=32, nheads_kv=8),
                    Row(_read_bias, _write_bias, _check_bias),
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
