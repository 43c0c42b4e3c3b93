"""The layout of Hugging Face transformers: a `config.json` with a `model_type`."""

from types import MappingProxyType

import numpy as np

from ....models import LanguageModelConfig
from .._fields import Fields
from .._layout import Layout, Slot, Unstorable
from .._tables import JSON
from ._bamba import BAMBA
from ._family import Family, describe_parts
from ._jamba import JAMBA
from ._mamba import FALCON_MAMBA, MAMBA, OFFICIAL_NAMES
from ._mamba2 import MAMBA2


# One line for each model type.
_FAMILIES = MappingProxyType(
    {family.model_type: family for family in (MAMBA, MAMBA2, FALCON_MAMBA, BAMBA, JAMBA)}
)


def _family(config: LanguageModelConfig) -> Family:
    """Returns the first family that can store a model.

    **Raises:** `Unstorable` if there is none, with the reasons of all families that have the kinds
    of mixers and MLPs of the model.
    """
    reasons: dict[str, list[str]] = {}
    for family in _FAMILIES.values():
        if family.has_parts(config):
            try:
                family.validate(config)
                return family
            except Unstorable as error:
                reasons.setdefault(str(error), []).append(family.model_type)
    if not reasons:
        raise Unstorable(describe_parts(config))
    if len(reasons) == 1:
        raise Unstorable(next(iter(reasons)))
    raise Unstorable(
        ", nor ".join(
            f"{reason} (as model type {' or '.join(map(repr, types))})"
            for reason, types in reasons.items()
        )
    )


def _read_transformers(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    family = _FAMILIES[fields.only("model_type", list(_FAMILIES), None)]
    fields.ignore_common()
    config = family.read(fields)
    fields.finish()
    return config


def _validate_transformers(config: LanguageModelConfig) -> None:
    _family(config)


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
    embedding=lambda config: _family(config).names.embedding,
    keeps_tied_head=False,
    # As `MambaModel.load_hook` of transformers does.
    renames=MappingProxyType({"backbone.embedding.weight": OFFICIAL_NAMES.embedding}),
    declares_ids=True,
)
