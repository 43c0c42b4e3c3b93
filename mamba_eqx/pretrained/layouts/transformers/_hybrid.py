"""What the hybrid model types of transformers share: blocks of a mixer and an MLP."""

from typing import Any

from ....models import AbstractMixerConfig, AttentionConfig, LanguageModelConfig
from .._fields import Fields
from ._common import inexpressible


# How to train and to generate, and which implementation to run.
HYBRID_IGNORED = frozenset(
    """
    attention_dropout initializer_range max_position_embeddings num_logits_to_keep
    use_mamba_kernels
    """.split()  # noqa: SIM905
)


# Ours: these model types keep the residual stream in the dtype of the parameters, and have no
# field for it.
RESIDUAL = "residual_in_fp32"


def read_heads(fields: Fields, d_model: int, *, nheads: int, nheads_kv: int) -> dict[str, Any]:
    """The sizes of attention, with the defaults of transformers' config class."""
    nheads = fields.size("num_attention_heads", nheads)
    nheads_kv = (
        nheads
        if fields.get("num_key_value_heads", nheads_kv) is None
        else fields.size("num_key_value_heads", nheads_kv)
    )
    if "head_dim" not in fields and d_model % nheads:
        raise fields.error("num_attention_heads", f"must divide hidden_size={d_model}")
    headdim = fields.optional_size("head_dim", max(1, d_model // nheads))
    return {"nheads": nheads, "nheads_kv": nheads_kv, "headdim": headdim}


def write_heads(config: AttentionConfig) -> dict[str, Any]:
    """The inverse of `read_heads`, of attention that has nothing special."""
    if config.d_conv > 0:
        raise inexpressible("attention has a convolution", f"d_conv={config.d_conv}")
    if config.window is not None:
        raise inexpressible("attention has a window", f"window={config.window}")
    if config.softmax_scale != config.headdim**-0.5:
        raise inexpressible(
            "attention is not scaled by 1 / sqrt(headdim)", f"softmax_scale={config.softmax_scale}"
        )
    fields = {"num_attention_heads": config.nheads, "num_key_value_heads": config.nheads_kv}
    if config.headdim * config.nheads != config.d_model:
        fields["head_dim"] = config.headdim
    return fields


def alike(config: LanguageModelConfig, kind: type[AbstractMixerConfig]) -> Any:
    """The config that all mixers of a kind share, or `None` if there are none."""
    found = [layer.mixer for layer in config.layers if isinstance(layer.mixer, kind)]
    for other in found:
        if other != found[0]:
            raise inexpressible("layers differ within one kind of mixer", f"{found[0]} and {other}")
    return found[0] if found else None


def write_blocks(config: LanguageModelConfig) -> dict[str, Any]:
    """What is said of the blocks, which must agree in all but their mixers."""
    block = config.layers[0]
    if block.d_intermediate is None:
        raise inexpressible("layers have attention but no MLP", "d_intermediate=None")
    for i, layer in enumerate(config.layers):
        for name in ("d_intermediate", "rms_norm", "norm_eps"):
            one, other = getattr(block, name), getattr(layer, name)
            if one != other:
                raise inexpressible(
                    f"layers differ in `{name}`", f"{one} in layer 0, {other} in {i}"
                )
    return {"intermediate_size": block.d_intermediate, "rms_norm_eps": config.norm_eps}
