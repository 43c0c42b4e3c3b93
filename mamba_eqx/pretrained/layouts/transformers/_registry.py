"""The layout of Hugging Face transformers: a `config.json` with a `model_type`."""

from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from ....models import LanguageModelConfig
from .._fields import Fields
from .._layout import Layout, Unstorable
from .._tables import JSON
from ._bamba import BAMBA
from ._falcon_h1 import FALCON_H1
from ._family import Family, describe_parts
from ._granite import GRANITE
from ._jamba import JAMBA
from ._mamba import FALCON_MAMBA, MAMBA
from ._mamba2 import MAMBA2
from ._nemotron_h import NEMOTRON_H


# In the order in which they are tried for saving a model.
_ALL = (MAMBA, MAMBA2, FALCON_MAMBA, BAMBA, JAMBA, GRANITE, NEMOTRON_H, FALCON_H1)
_FAMILIES = MappingProxyType({family.model_type: family for family in _ALL})


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
    family = _family_of(fields)
    fields.ignore_common()
    config = family.read(fields)
    fields.finish()
    return config


def _family_of(fields: Fields) -> Family:
    return _FAMILIES[fields.only("model_type", list(_FAMILIES), None)]


def _layout(choose: Callable[[LanguageModelConfig], Family]) -> Layout:
    """Returns the layout, given the function that chooses the family of a config."""

    def validate(config: LanguageModelConfig) -> None:
        choose(config).validate(config)

    def write(config: LanguageModelConfig, dtype: np.dtype) -> JSON:
        return choose(config).write(config) | {"dtype": dtype.name}

    return Layout(
        name="transformers",
        read_config=_read_transformers,
        validate=validate,
        write_config=write,
        table=lambda config: choose(config).slots(config),
        embedding=lambda config: choose(config).names.embedding,
        keeps_tied_head=False,
        renames=lambda config: choose(config).names.older,
        modules=lambda config: choose(config).names.modules,
        ignored=lambda config: choose(config).names.ignored,
        count=lambda config: choose(config).count(config),
        declares_ids=True,
    )


TRANSFORMERS = _layout(_family)


def transformers_layout(values: object) -> Layout:
    """Returns the layout with the names of the family that a config file declares.

    Two families can store the same model under different names. `TRANSFORMERS` chooses one of them
    for writing, but a file has the names of its own family.

    **Arguments:**

    - `values`: the content of the config file.

    **Raises:** `CheckpointError` if there is no such family.
    """
    family = _family_of(Fields(values, "the config"))
    return _layout(lambda config: family)
