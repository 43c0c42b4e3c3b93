"""Shared by the hybrid model types of transformers: the fields of attention and of Mamba-2."""

from collections.abc import Collection

from ....models import AttentionConfig, Mamba2Config, MixtureOfExpertsConfig
from .._fields import Fields
from .._layout import Unstorable
from .._mixers import D_MODEL, whole_expand
from .._names import mamba2
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Shared,
    Table,
    fixed,
    flag,
    limit,
    shared_eps,
    size,
)
from ._family import Kind, Kinds, Part
from ._mamba2 import UNSUPPORTED


# Options of training and generation, and the choice of an implementation.
HYBRID_IGNORED = frozenset(
    """
    attention_dropout initializer_range num_logits_to_keep use_mamba_kernels
    """.split()  # noqa: SIM905
)


def heads(
    *, nheads: int, nheads_kv: int | None, headdim: int | None = None
) -> tuple[Row[AttentionConfig], ...]:
    """Returns the rows of attention that all hybrids share, given the defaults of the file.

    **Arguments:**

    - `nheads`: the number of heads.
    - `nheads_kv`: the number of heads of keys and values; that of queries if `None`.
    - `headdim`: the number of features of a head; the width of the model divided by `nheads` if
        `None`.
    """

    def read(given: RowInput) -> Arguments:
        fields, d_model = given.fields, given.shared.d_model
        found = fields.size("num_attention_heads", nheads)
        found_kv = (
            found
            if fields.get("num_key_value_heads", nheads_kv) is None
            else fields.size("num_key_value_heads", nheads_kv)
        )
        if headdim is None and fields.get("head_dim", None) is None and d_model % found:
            raise fields.error("num_attention_heads", f"must divide hidden_size={d_model}")
        found_dim = fields.optional_size("head_dim", headdim or max(1, d_model // found))
        return {"nheads": found, "nheads_kv": found_kv, "headdim": found_dim}

    def write(config: AttentionConfig) -> JSON:
        fields: JSON = {
            "num_attention_heads": config.nheads,
            "num_key_value_heads": config.nheads_kv,
        }
        if headdim is not None or config.headdim * config.nheads != config.d_model:
            fields["head_dim"] = config.headdim
        return fields

    return (
        Row(read, write),
        fixed("d_conv", 0, "attention with a convolution"),
        fixed("window", None, "attention with a window"),
    )


def _check_scale(config: AttentionConfig, _: Shared) -> None:
    if config.softmax_scale != config.headdim**-0.5:
        raise Unstorable(
            "attention with a scale other than 1 / sqrt(headdim) "
            f"(softmax_scale={config.softmax_scale})"
        )


# The row of the softmax scale, for model types that have no field for it.
USUAL_SCALE: Row[AttentionConfig] = Row(check=_check_scale)


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


ATTENTION_BIAS: Row[AttentionConfig] = Row(_read_bias, _write_bias, _check_bias)


# Falcon-H1 has the base 1e11. Larger ones differ in the slowest angles only.
_MAX_ROPE_BASE = 2**50

# The fields of a rotary embedding that a file of a model without one may have nonetheless.
ROPE_FIELDS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})


def read_rope(fields: Fields, partial: float) -> tuple[float, float]:
    """Reads the base of a rotary embedding, and the share of a head that is rotated.

    **Arguments:**

    - `fields`: the fields of the file.
    - `partial`: the default share.
    """
    # Older configs have the base at the top level, and a share that transformers never reads.
    base, share = fields.number("rope_theta", 10000.0, limit=_MAX_ROPE_BASE), partial
    fields.only("partial_rotary_factor", [partial], partial)
    fields.only("rope_scaling", [None], None)
    parameters = fields.get("rope_parameters", None)
    if parameters is not None:
        rope = Fields(parameters, "`rope_parameters`")
        rope.only("rope_type", ["default"], "default")
        base = rope.number("rope_theta", base, limit=_MAX_ROPE_BASE)
        share = rope.number("partial_rotary_factor", share)
        rope.finish()
    return base, share


def _read_whole_rope(given: RowInput) -> Arguments:
    base, share = read_rope(given.fields, 1.0)
    if share != 1:
        raise given.fields.error(
            "rope_parameters", "must have no `partial_rotary_factor` other than 1"
        )
    return {"rotary_emb_dim": given.known["headdim"], "rotary_emb_base": base}


def _write_whole_rope(config: AttentionConfig) -> JSON:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_emb_base}}


def _check_whole_rope(config: AttentionConfig, _: Shared) -> None:
    if config.rotary_emb_dim != config.headdim or config.rotary_emb_interleaved:
        raise Unstorable(
            "attention with a rotary embedding of a part of each head, or an interleaved one "
            f"(rotary_emb_dim={config.rotary_emb_dim} and headdim={config.headdim}, "
            f"rotary_emb_interleaved={config.rotary_emb_interleaved})"
        )


# The row of a rotary embedding of whole heads.
WHOLE_ROPE: Row[AttentionConfig] = Row(_read_whole_rope, _write_whole_rope, _check_whole_rope)


def mamba2_sizes(width: str) -> tuple[Row[Mamba2Config], ...]:
    """Returns the rows of Mamba-2's sizes in `bamba` and later model types, except for its width,
    which the row before must have read and messages call `width`."""

    def read_heads(given: RowInput) -> Arguments:
        fields, d_inner = given.fields, given.known["d_inner"]
        nheads = fields.size("mamba_n_heads", 128)
        if fields.get("mamba_d_head", "auto") == "auto":
            headdim = max(1, d_inner // nheads)
        else:
            headdim = fields.size("mamba_d_head")
        if nheads * headdim != d_inner:
            raise fields.error(
                "mamba_n_heads", f"times {headdim} per head must be {width} = {d_inner}"
            )
        return {"headdim": headdim}

    def write_heads(config: Mamba2Config) -> JSON:
        return {"mamba_n_heads": config.d_inner // config.headdim, "mamba_d_head": config.headdim}

    return (
        Row(read_heads, write_heads),
        size("mamba_n_groups", "ngroups", 1),
        size("mamba_d_state", "d_state", 256),
        size("mamba_d_conv", "d_conv", 4),
        flag("mamba_conv_bias", "conv_bias", True),
        limit("time_step_limit", "dt_limit"),
    )


# Mamba-2 with the fields, the defaults and the names of `bamba`, which later model types share.
BAMBA_MAMBA2 = Part(
    Table(
        Mamba2Config,
        (
            D_MODEL,
            whole_expand("mamba_expand"),
            *UNSUPPORTED,
            *mamba2_sizes("hidden_size * mamba_expand"),
            flag("mamba_proj_bias", "bias", False),
            shared_eps(),
        ),
        # The chunk size does not affect the result.
        ignored=("mamba_chunk_size",),
    ),
    mamba2,
    "mamba",
)


def named_experts(key: str, default: int) -> Row[MixtureOfExpertsConfig]:
    """Returns the row of the number of experts, each of which has names of its own in the file.

    The number is bounded, so that a damaged file cannot fill the memory with names.
    """

    def read(given: RowInput) -> Arguments:
        return {"n_experts": given.fields.count(key, default)}

    def check(config: MixtureOfExpertsConfig, _: Shared) -> None:
        # In transformers, a single expert of Jamba is an MLP, and one of Nemotron-H cannot run.
        if config.n_experts == 1:
            raise Unstorable("a router with a single expert (n_experts=1)")

    return Row(read, lambda config: {key: config.n_experts}, check)


def _check_shared_expert(config: MixtureOfExpertsConfig, _: Shared) -> None:
    if config.d_shared is None:
        raise Unstorable("experts without a shared expert (d_shared=None)")


# The row of the shared expert, for model types that always have one.
SHARED_EXPERT: Row[MixtureOfExpertsConfig] = Row(check=_check_shared_expert)


def hybrid_kinds(attention: Collection[int], n_layer: int) -> Kinds:
    """Returns the kinds of the layers of a model of Mamba and attention with an MLP in every layer,
    given the indices of the attention layers and the number of layers."""
    kinds = (Kind("mamba", "mlp"), Kind("attention", "mlp"))
    return [kinds[i in attention] for i in range(n_layer)]


def attention_layers(kinds: Kinds) -> list[int]:
    """Returns the indices of the attention layers."""
    return [i for i, kind in enumerate(kinds) if kind.mixer == "attention"]


def check_mlps(kinds: Kinds) -> None:
    """Raises `Unstorable` unless every layer has an MLP."""
    for i, kind in enumerate(kinds):
        if kind.mlp is None:
            raise Unstorable(f"hybrids with a layer without an MLP (mlp=None in layer {i})")


def check_hybrid(kinds: Kinds) -> None:
    """Raises `Unstorable` unless every layer has an MLP, and some layer is not attention."""
    check_mlps(kinds)
    if all(kind.mixer == "attention" for kind in kinds):
        raise Unstorable(f"models of attention alone ({len(kinds)} layers)")
