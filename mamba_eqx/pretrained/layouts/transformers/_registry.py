"""The layout of Hugging Face transformers: a `config.json` with a `model_type`."""

from types import MappingProxyType

import numpy as np

from ....models import AttentionConfig, LanguageModelConfig, Mamba1Config, Mamba2Config
from .._fields import Fields
from .._layout import Layout, Slot, Unstorable
from .._mixers import layer_kind
from .._tables import JSON
from ._bamba import BAMBA
from ._family import Family
from ._jamba import JAMBA
from ._mamba import EMBEDDING, FALCON_MAMBA, MAMBA
from ._mamba2 import MAMBA2


# One line for each model type.
_FAMILIES = MappingProxyType(
    {family.model_type: family for family in (MAMBA, MAMBA2, FALCON_MAMBA, BAMBA, JAMBA)}
)


def _family(config: LanguageModelConfig) -> Family:
    """Returns the family that may store a model, judging by the kinds of its layers.

    **Raises:** `Unstorable` if no family has layers of these kinds.
    """
    mixers = [layer.mixer for layer in config.layers]
    kinds = {type(mixer) for mixer in mixers}
    has_mlp = any(layer.d_intermediate is not None for layer in config.layers)
    if AttentionConfig not in kinds and not has_mlp:
        match mixers[0]:
            case Mamba1Config(select_norm="weightless"):
                return FALCON_MAMBA
            case Mamba1Config():
                return MAMBA
            case Mamba2Config():
                return MAMBA2
    elif kinds <= {Mamba2Config, AttentionConfig}:
        return BAMBA
    elif kinds <= {Mamba1Config, AttentionConfig}:
        return JAMBA
    names = " and ".join(sorted({layer_kind(mixer) for mixer in mixers}))
    raise Unstorable(f"{names} layers" + (" in one model" if len(kinds) > 1 else ""))


def _read_transformers(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    family = _FAMILIES[fields.only("model_type", list(_FAMILIES), None)]
    fields.ignore_common()
    config = family.read(fields)
    fields.finish()
    return config


def _validate_transformers(config: LanguageModelConfig) -> None:
    _family(config).validate(config)


def _write_transformers(config: LanguageModelConfig, dtype: np.dtype) -> JSON:
    return _family(config).write(config) | {"dtype": dtype.name}


def _name_transformers(config: LanguageModelConfig) -> list[Slot]:
    return _family(config).slots(config)


TRANSFORMERS = Layout(
    name="transformers",
    read_config=_read_transformers,
    validate=_validate_transformers,
    write_config=_write_transformers,
    table=_name_transformers,
    embedding=lambda config: _family(config).embedding,
    keeps_tied_head=False,
    # As `MambaModel.load_hook` of transformers does.
    renames=MappingProxyType({"backbone.embedding.weight": EMBEDDING}),
    declares_ids=True,
)
