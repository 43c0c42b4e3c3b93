"""The model card of a checkpoint: metadata, and how to load the model."""

from typing import Any

from ..models import AbstractMixerConfig, LanguageModelConfig, ParallelConfig


CARD = "README.md"
_TEMPLATE = """\
---
library_name: mamba_eqx
pipeline_tag: {task}
tags:
{tags}
---

# {title}

A {model} of {kinds} layers. Please add here what it was trained on, how well it performs,
and its licence.

```python
import mamba_eqx as mbx

{load}("{name}")
```
"""
_TRANSFORMERS = """
The checkpoint is in the layout of transformers, which can load it as well:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""


def model_card(
    config: LanguageModelConfig,
    *,
    layout: str,
    name: str,
    quantized: bool = False,
    classifier: bool = False,
) -> str:
    """Returns the text of a model card.

    The card contains no numbers, because it is kept if the checkpoint is replaced later.

    **Arguments:**

    - `config`: the config of the model.
    - `layout`: the name of the layout.
    - `name`: the repository or folder to load the model from.
    - `quantized`: whether the weights are quantised, which transformers cannot load.
    - `classifier`: whether the model is a sequence classifier, which transformers can load of few
        families only.
    """
    kinds = list(dict.fromkeys(kind for layer in config.layers for kind in _kinds(layer.mixer)))
    tags = ["mamba_eqx", "jax", "state-space-model", *kinds]
    for_both = layout == "transformers" and not quantized and not classifier
    text = _TEMPLATE + (_TRANSFORMERS if for_both else "")
    return text.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title=name.split("/")[-1],
        kinds=" and ".join(kinds),
        name=name,
        task="text-classification" if classifier else "text-generation",
        model="sequence classifier" if classifier else "language model",
        load="model, labels = mbx.load_classifier" if classifier else "model = mbx.from_pretrained",
    )


def _kinds(mixer: AbstractMixerConfig[Any]) -> list[str]:
    """Returns the kind of a mixer, or the kinds of mixers side by side."""
    if isinstance(mixer, ParallelConfig):
        return [kind for part in mixer.mixers for kind in _kinds(part)]
    return [mixer.kind]
