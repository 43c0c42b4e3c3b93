"""Shared by the hybrid model types of transformers: the sizes and limits of attention."""

from collections.abc import Callable, Collection

from ....models import AttentionConfig
from .._layout import Unstorable
from .._tables import JSON, Arguments, Row, RowInput, Shared, fixed
from ._family import Kind, Kinds


# Options of training and generation, and the choice of an implementation.
HYBRID_IGNORED = frozenset(
    """
    attention_dropout initializer_range num_logits_to_keep use_mamba_kernels
    """.split()  # noqa: SIM905
)


def _check_scale(config: AttentionConfig, _: Shared) -> None:
    if config.softmax_scale != config.headdim**-0.5:
        raise Unstorable(
            "attention with a scale other than 1 / sqrt(headdim) "
            f"(softmax_scale={config.softmax_scale})"
        )


def heads(*, nheads: int, nheads_kv: int) -> tuple[Row[AttentionConfig], ...]:
    """Returns the rows of attention that all hybrids share, given the defaults of the file."""

    def read(given: RowInput) -> Arguments:
        fields, d_model = given.fields, given.shared.d_model
        found = fields.size("num_attention_heads", nheads)
        found_kv = (
            found
            if fields.get("num_key_value_heads", nheads_kv) is None
            else fields.size("num_key_value_heads", nheads_kv)
        )
        if "head_dim" not in fields and d_model % found:
            raise fields.error("num_attention_heads", f"must divide hidden_size={d_model}")
        headdim = fields.optional_size("head_dim", max(1, d_model // found))
        return {"nheads": found, "nheads_kv": found_kv, "headdim": headdim}

    def write(config: AttentionConfig) -> JSON:
        fields: JSON = {
            "num_attention_heads": config.nheads,
            "num_key_value_heads": config.nheads_kv,
        }
        if config.headdim * config.nheads != config.d_model:
            fields["head_dim"] = config.headdim
        return fields

    return (
        Row(read, write),
        fixed("d_conv", 0, "attention with a convolution"),
        fixed("window", None, "attention with a window"),
        Row(lambda given: {}, lambda config: {}, _check_scale),
    )


def attention_and(mixer: str) -> Callable[[Collection[int], int], Kinds]:
    """Returns a function from the indices of the attention layers, and the number of layers, to
    the kinds of layers of a model in which every layer has an MLP; the other layers have `mixer`.
    """
    kinds = (Kind(mixer, "mlp"), Kind("attention", "mlp"))
    return lambda indices, n_layer: [kinds[i in indices] for i in range(n_layer)]


def attention_layers(kinds: Kinds) -> list[int]:
    """Returns the indices of the attention layers."""
    return [i for i, kind in enumerate(kinds) if kind.mixer == "attention"]


def check_hybrid(kinds: Kinds) -> None:
    """Raises `Unstorable` unless every layer has an MLP, and some layer is not attention."""
    if any(kind.mlp is None for kind in kinds):
        raise Unstorable("attention layers without an MLP (mlp=None)")
    if all(kind.mixer == "attention" for kind in kinds):
        raise Unstorable(f"models of attention alone ({len(kinds)} layers)")
