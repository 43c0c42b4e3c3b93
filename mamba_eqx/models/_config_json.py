"""The JSON format of `LanguageModelConfig`.

Each config becomes an object with a key for each field. The object of a mixer also has the key
`kind`.
"""

import dataclasses
import json
import math
from typing import Any

from ._block_config import BlockConfig
from .mixer_configs import MIXER_CONFIGS


# JSON has no number for infinity.
_INFINITY = "Infinity"


def to_json(config: Any) -> str:
    """Converts a `LanguageModelConfig` to JSON."""
    fields = dataclasses.asdict(config)
    for layer, block in zip(fields["layers"], config.layers, strict=True):
        layer["mixer"] = {"kind": block.mixer.kind} | layer["mixer"]
    return json.dumps(_encode(fields), indent=2, allow_nan=False)


def fields_from_json(text: str, config: type) -> dict[str, Any]:
    """Reads the fields of a `LanguageModelConfig`, the class `config`, from JSON.

    **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or invalid.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("The config must be JSON, but is nested too deeply.") from None
    fields = _read_object(values, config, "the config")
    layers = fields["layers"]
    if not isinstance(layers, list):
        raise ValueError(f"`layers` must be a list, but got layers={layers!r}.")
    return fields | {"layers": tuple(map(_read_block, layers))}


def _read_block(value: object) -> BlockConfig:
    fields = _read_object(value, BlockConfig, "an entry of `layers`")
    mixer = fields["mixer"]
    kind = mixer.get("kind") if isinstance(mixer, dict) else None
    configs = {config.kind: config for config in MIXER_CONFIGS.values()}
    if not isinstance(kind, str) or kind not in configs:
        raise ValueError(
            f"The `kind` of a `mixer` must be one of {sorted(configs)}, but got mixer={mixer!r}."
        )
    options = {name: _decode(entry) for name, entry in mixer.items() if name != "kind"}
    config = configs[kind]
    fields["mixer"] = config(**_read_object(options, config, f"a mixer of kind {kind!r}"))
    return BlockConfig(**fields)


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


def _encode(value: object) -> object:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_encode(entry) for entry in value]
    return _INFINITY if value == math.inf else value


def _decode(value: object) -> object:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    return math.inf if value == _INFINITY else value
