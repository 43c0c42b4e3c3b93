"""The JSON format of `LanguageModelConfig` and `SequenceClassifierConfig`.

Each config becomes an object with a key for each field. The objects of mixers and MLPs also have
the key `kind`.
"""

import dataclasses
import json
import math
from types import MappingProxyType
from typing import Any

from ._block_config import BlockConfig
from .mixer_configs import MIXER_CONFIGS
from .mlp_configs import MLP_CONFIGS


# JSON has no number for infinity.
_INFINITY = "Infinity"

_KINDS = MappingProxyType(
    {config.kind: config for config in (*MIXER_CONFIGS.values(), *MLP_CONFIGS.values())}
)


def to_json(config: Any) -> str:
    """Converts the config of a model to JSON."""
    return json.dumps(_encode(config), indent=2, allow_nan=False)


def fields_from_json(text: str, config: type) -> dict[str, Any]:
    """Reads the fields of a `LanguageModelConfig`, the class `config`, from JSON.

    **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or invalid.
    """
    try:
        return _read_fields(json.loads(text), config, "the config")
    except RecursionError:
        raise _too_deep() from None


def classifier_fields_from_json(text: str, config: type, backbone: type) -> dict[str, Any]:
    """Reads the fields of a `SequenceClassifierConfig`, the class `config`, from JSON.

    **Arguments:**

    - `text`: the JSON.
    - `config`, `backbone`: the classes of the config and of its backbone.

    **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or invalid.
    """
    try:
        fields = _read_object(json.loads(text), config, "the config")
        return fields | {
            "backbone": backbone(**_read_fields(fields["backbone"], backbone, "`backbone`"))
        }
    except RecursionError:
        raise _too_deep() from None


def _too_deep() -> ValueError:
    return ValueError("The config must be JSON, but is nested too deeply.")


def _read_fields(value: object, config: type, what: str) -> dict[str, Any]:
    """Reads the fields of a `LanguageModelConfig`, the class `config`."""
    fields = _read_object(value, config, what)
    layers = fields["layers"]
    if not isinstance(layers, list):
        raise ValueError(f"`layers` must be a list, but got layers={layers!r}.")
    return fields | {"layers": tuple(map(_read_block, layers))}


def _read_block(value: object) -> BlockConfig:
    fields = _read_object(value, BlockConfig, "an entry of `layers`")
    # The config checks the types.
    decoded: dict[str, Any] = {name: _decode(entry) for name, entry in fields.items()}
    return BlockConfig(**decoded)


def _read_part(value: dict[str, object]) -> object:
    """Reads the config of a mixer or an MLP."""
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            f"The `kind` of a mixer or an MLP must be one of {sorted(_KINDS)}, but got {value!r}."
        )
    config = _KINDS[kind]
    options = {name: _decode(entry) for name, entry in value.items() if name != "kind"}
    return config(**_read_object(options, config, f"an object of kind {kind!r}"))


def _read_object(value: object, config: type, what: str) -> dict[str, Any]:
    """Returns the JSON object `value` after checking that its keys are fields of `config`."""
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object for {what}, but got {value!r}.")
    fields = dataclasses.fields(config)
    unknown = value.keys() - {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = required - value.keys()
    if unknown or missing:
        raise ValueError(
            f"The keys of {what} must be fields of {config.__name__}, but got "
            f"unknown {sorted(unknown)}, missing {sorted(missing)}."
        )
    return dict(value)


def _encode(value: Any) -> object:
    if dataclasses.is_dataclass(value):
        kind = {"kind": _kind} if (_kind := getattr(value, "kind", None)) else {}
        names = [field.name for field in dataclasses.fields(value)]
        return kind | {name: _encode(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_encode(entry) for entry in value]
    return _INFINITY if value == math.inf else value


def _decode(value: object) -> object:
    if isinstance(value, dict):
        return _read_part(value)
    if isinstance(value, list):
        return tuple(map(_decode, value))
    return math.inf if value == _INFINITY else value
