"""transformers' model type `jamba`: Mamba-1 with norms of `dt`, `B` and `C`, attention without
positions, and in every block an MLP or a mixture of experts.

The defaults are those of `JambaConfig`.
"""

from ....models import (
    AttentionConfig,
    GatedMLPConfig,
    LanguageModelConfig,
    Mamba1Config,
    MixtureOfExpertsConfig,
)
from .._fields import Fields
from .._layout import Slot, Unstorable
from .._mixers import D_MODEL, UNSCALED, dt_rank, gated_mlp as mlp_table, whole_expand
from .._names import mamba1, norm, same
from .._tables import JSON, Row, Shared, Table, constant, fixed, flag, shared_eps, size
from ._family import Family, Kinds, Part, Pattern, model_rows
from ._hybrid import (
    HYBRID_IGNORED,
    USUAL_SCALE,
    attention_layers,
    check_hybrid,
    heads,
    hybrid_kinds,
    named_experts,
)
from ._hybrid_names import LLAMA_NAMES, attention, experts, gated_mlp, split


# Options of training, the choice of an implementation, and fields of older versions.
_IGNORED = HYBRID_IGNORED | set(
    """
    output_router_logits router_aux_loss_coef use_associative_scan use_mambapy
    calc_logits_for_entire_prompt n_ctx
    """.split()  # noqa: SIM905
)


def _read_pattern(fields: Fields) -> Kinds:
    n_layer = fields.count("num_hidden_layers", 32)
    kinds = hybrid_kinds(_read_period(fields, "attn_layer", n_layer, 8, 4), n_layer)
    experts = _read_period(fields, "expert_layer", n_layer, 2, 1)
    if fields.size("num_experts", 16) == 1:
        return kinds
    return [kind._replace(mlp="experts") if i in experts else kind for i, kind in enumerate(kinds)]


def _read_period(
    fields: Fields, key: str, n_layer: int, default_period: int, default_offset: int
) -> range:
    """Reads the indices of layers that are at regular intervals."""
    period = fields.size(f"{key}_period", default_period)
    offset = fields.natural(f"{key}_offset", default_offset)
    if offset >= period:
        raise fields.error(f"{key}_offset", f"must be below {key}_period={period}")
    return range(offset, n_layer, period)


def _write_pattern(kinds: Kinds) -> JSON:
    experts = _experts(kinds)
    periods = _write_period("attn_layer", attention_layers(kinds), len(kinds))
    if experts:
        periods |= _write_period("expert_layer", experts, len(kinds))
    return {"num_hidden_layers": len(kinds), **periods}


def _write_period(key: str, indices: list[int], n_layer: int) -> JSON:
    found = _find_period(indices, n_layer)
    assert found is not None  # As `_check_pattern` ensures.
    return {f"{key}_period": found[0], f"{key}_offset": found[1]}


def _check_pattern(kinds: Kinds) -> None:
    check_hybrid(kinds)
    for what, indices in (("attention", attention_layers(kinds)), ("experts", _experts(kinds))):
        if _find_period(indices, len(kinds)) is None:
            raise Unstorable(
                f"{what} beside Mamba-1 at irregular intervals "
                f"(in layers {indices} of {len(kinds)})"
            )


def _experts(kinds: Kinds) -> list[int]:
    return [i for i, kind in enumerate(kinds) if kind.mlp == "experts"]


def _find_period(indices: list[int], n_layer: int) -> tuple[int, int] | None:
    """Returns the period and the offset of layers, if they are periodic."""
    # The last period is longer than the model, which expresses a model without such layers.
    for period in range(1, n_layer + 2):
        for offset in range(period):
            if indices == list(range(offset, n_layer, period)):
                return period, offset
    return None


def _check_widths(config: LanguageModelConfig, _: Shared) -> None:
    widths = {
        layer.mlp.d_intermediate
        for layer in config.layers
        if isinstance(layer.mlp, GatedMLPConfig | MixtureOfExpertsConfig)
    }
    if len(widths) > 1:
        raise Unstorable(
            f"MLPs and experts of different widths beside Mamba-1 (d_intermediate={sorted(widths)})"
        )


def _mixture(config: MixtureOfExpertsConfig) -> list[Slot]:
    width = config.d_intermediate
    one = split({"up_proj": width, "gate_proj": width}, "weight", "fc1")
    return [
        *same("router.weight"),
        *experts([*one, Slot("down_proj.weight", "fc2")], config.n_experts),
    ]


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
                        "MLPs, experts or attention beside Mamba-1 layers without norms of `dt`, "
                        "`B` and `C`",
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
        ),
        "experts": Part(
            Table(
                MixtureOfExpertsConfig,
                (
                    named_experts("num_experts", 16),
                    size("num_experts_per_tok", "top_k", 2),
                    size("intermediate_size", "d_intermediate", 14336),
                    fixed("routing", "softmax", "experts beside Mamba-1 with another routing"),
                    fixed("gated", True, "ungated experts beside Mamba-1"),
                    fixed("d_shared", None, "shared experts beside Mamba-1"),
                    fixed("d_latent", None, "experts in a smaller space beside Mamba-1"),
                ),
            ),
            _mixture,
            "feed_forward",
            absent={"num_experts": 1},
            unused={"num_experts_per_tok"},
        ),
    },
    pattern=Pattern(_read_pattern, _write_pattern, _check_pattern),
    model=Table(
        LanguageModelConfig,
        (
            *model_rows(vocab_size=65536, tie_embeddings=False, residual_in_fp32=False),
            *UNSCALED,
            Row(check=_check_widths),
        ),
        ignored=_IGNORED,
    ),
    names=LLAMA_NAMES,
)
