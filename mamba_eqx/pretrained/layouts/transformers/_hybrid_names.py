"""The names of parameters in transformers' hybrid models, most of them the names of Llama's."""

from collections.abc import Mapping

from ....models import AttentionConfig, BlockConfig, LanguageModelConfig, Mamba1Config
from .._layout import Slot
from .._names import layer, mixer, norm, same, within


EMBEDDING = "model.embed_tokens.weight"


def hybrid_model(config: LanguageModelConfig) -> list[Slot]:
    """Returns the slots of a model of type Bamba or Jamba."""
    slots = [Slot(EMBEDDING, "embedding.weight")]
    for i, block in enumerate(config.layers):
        slots += within(_block(block), f"model.layers.{i}", layer(i))
    slots += norm("model.final_layernorm", "norm_f", rms_norm=config.rms_norm)
    return slots if config.tie_embeddings else [*slots, *same("lm_head.weight")]


def _block(config: BlockConfig) -> list[Slot]:
    inner = config.mixer
    if isinstance(inner, AttentionConfig):
        slots = within(_attention(inner), "self_attn", "mixer")
    else:
        slots = within(mixer(inner), "mamba", "mixer")
    if isinstance(inner, Mamba1Config) and inner.select_norm == "weighted":
        for name, path in {"dt": "dt_norm", "b": "B_norm", "c": "C_norm"}.items():
            slots += norm(f"mamba.{name}_layernorm", f"mixer.{path}", rms_norm=True)
    slots += norm("input_layernorm", "norm", rms_norm=config.rms_norm)
    if config.d_intermediate is not None:
        slots += norm("pre_ff_layernorm", "norm2", rms_norm=config.rms_norm)
        fc1 = {"up_proj": config.d_intermediate, "gate_proj": config.d_intermediate}
        slots += within(split(fc1, "weight", "fc1.weight"), "feed_forward", "mlp")
        slots.append(Slot("feed_forward.down_proj.weight", "mlp.fc2.weight"))
    return slots


def _attention(config: AttentionConfig) -> list[Slot]:
    kv_rows = config.nheads_kv * config.headdim
    qkv = {"q_proj": config.nheads * config.headdim, "k_proj": kv_rows, "v_proj": kv_rows}
    slots = split(qkv, "weight", "in_proj.weight")
    slots.append(Slot("o_proj.weight", "out_proj.weight"))
    if config.qkv_proj_bias:
        slots += split(qkv, "bias", "in_proj.bias")
    if config.out_proj_bias:
        slots.append(Slot("o_proj.bias", "out_proj.bias"))
    return slots


def split(sizes: Mapping[str, int], ending: str, path: str) -> list[Slot]:
    """Returns the slots of a leaf whose rows are divided among several modules of the file.

    **Arguments:**

    - `sizes`: the number of rows of each module, in order.
    - `ending`: the name of the tensor in each module.
    - `path`: the path of the leaf.
    """
    slots: list[Slot] = []
    end = 0
    for name, size in sizes.items():
        slots.append(Slot(f"{name}.{ending}", path, rows=(end, end + size)))
        end += size
    return slots
