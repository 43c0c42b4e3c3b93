"""The model card of a checkpoint that has none: its metadata, and how it is loaded."""

from ..models import LanguageModelConfig


CARD = "README.md"
_TEMPLATE = """\
---
library_name: mamba_eqx
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

A language model made of {kinds} layers. Please say here what it was trained on, how good it is,
and under which licence it may be used.

```python
import mamba_eqx as mbx

model = mbx.from_pretrained("{name}")
```
"""
_TRANSFORMERS = """
It is in the layout of transformers, which loads it as well:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""


def model_card(config: LanguageModelConfig, *, layout: str, name: str) -> str:
    """The text of the card.

    It has no number in it: a card stays when another model is saved over this one.

    **Arguments:**

    - `name`: what to load: a repository, or the name of a folder.
    """
    kinds = list(dict.fromkeys(layer.mixer.kind for layer in config.layers))
    tags = ["mamba_eqx", "jax", "state-space-model", *kinds]
    text = _TEMPLATE + (_TRANSFORMERS if layout == "transformers" else "")
    return text.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title=name.split("/")[-1],
        kinds=" and ".join(kinds),
        name=name,
    )
