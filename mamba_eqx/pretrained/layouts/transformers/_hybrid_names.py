"""The names of parameters in transformers' hybrid models: those of a transformer, for the most."""

from collections.abc import Callable, Mapping
from typing import Any

from ....models import AttentionConfig, BlockConfig, LanguageModelConfig, Mamba1Config
from .._layout import Entry
from .._names import layer_of, mixer, norm


EMBEDDING = "model.embed_tokens.weight"


def hybrid_model(config: LanguageModelConfig) -> list[Entry]:
    """The names in a whole model of Bamba or Jamba."""
    entries = [Entry(EMBEDDING, lambda model: model.embedding.weight)]
    for i, layer in enumerate(config.layers):
        where = layer_of(i)
        entries += [entry.within(f"model.layers.{i}", where) for entry in _block(layer)]
    entries += norm("model.final_layernorm", lambda model: model.norm_f, config.rms_norm)
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", lambda model: model.lm_head.weight))
    return entries


def _block(config: BlockConfig) -> list[Entry]:
    inner, of = config.mixer, lambda block: block.mixer
    if isinstance(inner, AttentionConfig):
        entries = [entry.within("self_attn", of) for entry in _attention(inner)]
    else:
        entries = [entry.within("mamba", of) for entry in mixer(inner)]
    if isinstance(inner, Mamba1Config) and inner.select_norm == "weighted":
        entries += norm("mamba.dt_layernorm", lambda block: block.mixer.dt_norm, True)
        entries += norm("mamba.b_layernorm", lambda block: block.mixer.B_norm, True)
        entries += norm("mamba.c_layernorm", lambda block: block.mixer.C_norm, True)
    entries += norm("input_layernorm", lambda block: block.norm, config.rms_norm)
    if config.d_intermediate is not None:
        entries += norm("pre_ff_layernorm", lambda block: block.norm2, config.rms_norm)
        fc1 = {"up_proj": config.d_intermediate, "gate_proj": config.d_intermediate}
        parts = _parts(fc1, "weight", lambda block: block.mlp.fc1.weight)
        parts.append(Entry("down_proj.weight", lambda block: block.mlp.fc2.weight))
        entries += [part.within("feed_forward", lambda block: block) for part in parts]
    return entries


def _attention(config: AttentionConfig) -> list[Entry]:
    of_keys = config.nheads_kv * config.headdim
    qkv = {"q_proj": config.nheads * config.headdim, "k_proj": of_keys, "v_proj": of_keys}
    entries = _parts(qkv, "weight", lambda mixer: mixer.in_proj.weight)
    entries.append(Entry("o_proj.weight", lambda mixer: mixer.out_proj.weight))
    if config.qkv_proj_bias:
        entries += _parts(qkv, "bias", lambda mixer: mixer.in_proj.bias)
    if config.out_proj_bias:
        entries.append(Entry("o_proj.bias", lambda mixer: mixer.out_proj.bias))
    return entries


def _parts(sizes: Mapping[str, int], of: str, where: Callable[[Any], Any]) -> list[Entry]:
    """A projection here that is several in the file, one after another in its rows."""
    entries, end = [], 0
    for name, size in sizes.items():
        entries.append(Entry(f"{name}.{of}", where, rows=(end, end + size)))
        end += size
    return entries
