"""The ids of special tokens that a checkpoint declares, in `generation_config.json` and
`config.json`."""

from pathlib import Path

from ..formats import CheckpointError, quote_value, read_object
from ..text import SpecialIds
from ._source import CONFIGS, Source


GENERATION_CONFIG = "generation_config.json"
_MAX_BYTES = 2**22
_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def declared_ids(source: Source) -> SpecialIds:
    """Reads the ids that a checkpoint declares.

    As in transformers, a `generation_config.json` alone counts, even if it lacks a field that
    `config.json` has. A negative id or `null` declares none.

    **Raises:** `CheckpointError` if a file is damaged, or a field is neither an id nor, for the end
    tokens, a list of ids.
    """
    generation = _ids_of(source, GENERATION_CONFIG)
    ids = config_ids(source) if generation is None else generation
    return SpecialIds() if ids is None else ids


def config_ids(source: Source) -> SpecialIds | None:
    """Reads the ids in the config of a checkpoint; `None` if it has no field for ids.

    **Raises:** `CheckpointError` as `declared_ids` does.
    """
    found = (_ids_of(source, name) for name in CONFIGS)
    return next((ids for ids in found if ids is not None), None)


def usable_ids(source: Source) -> SpecialIds:
    """Reads the declared ids that are tokens of the model's vocabulary.

    Ids outside of the vocabulary, which small copies of large models inherit, are left out: the
    model never generates them, so they neither begin nor end a text.

    **Raises:** `CheckpointError` as `declared_ids` does.
    """
    ids, rows = declared_ids(source), _vocabulary(source)
    return SpecialIds(
        ids.bos if ids.bos is not None and ids.bos < rows else None,
        tuple(i for i in ids.eos if i < rows),
        ids.pad if ids.pad is not None and ids.pad < rows else None,
    )


def ids_to_json(ids: SpecialIds) -> dict[str, object]:
    """Returns the fields of a config that declare ids, with `null` for those that there are not.

    Without the fields, transformers would use the defaults of the model type, and token 0 would end
    every text of a `mamba`.
    """
    eos = [*ids.eos]
    declared = (ids.bos, eos[0] if len(eos) == 1 else eos or None, ids.pad)
    return dict(zip(_FIELDS, declared, strict=True))


def read_generation_config(source: Source) -> dict[str, object]:
    """Reads `generation_config.json`; empty if there is none.

    **Raises:** `CheckpointError` if the file is damaged.
    """
    path = source.find(GENERATION_CONFIG)
    return {} if path is None else read_object(path, _MAX_BYTES)


def _ids_of(source: Source, name: str) -> SpecialIds | None:
    """Reads the ids in a file; `None` if there is no such file, or a config without the fields."""
    path = source.find(name)
    values = {} if path is None else read_object(path, _MAX_BYTES)
    if path is None or (name != GENERATION_CONFIG and not any(key in values for key in _FIELDS)):
        return None
    bos, eos, pad = (_ids(path, key, values.get(key)) for key in _FIELDS)
    return SpecialIds(bos[0] if bos else None, eos, pad[0] if pad else None)


def _ids(path: Path, key: str, value: object) -> tuple[int, ...]:
    several = key == "eos_token_id" and isinstance(value, list)
    values: list[object] = [*value] if isinstance(value, list) and several else [value]
    values = [entry for entry in values if several or entry is not None]
    if any(type(entry) is not int for entry in values):
        kind = "a token id, a list of them," if key == "eos_token_id" else "a token id"
        raise CheckpointError(
            f"{path}: `{key}` must be {kind} or null, but is {quote_value(value)}. Correct the "
            "field, or remove it."
        )
    ids = dict.fromkeys(entry for entry in values if isinstance(entry, int) and entry >= 0)
    return tuple(ids)


def _vocabulary(source: Source) -> int:
    """Returns the number of rows of the model's vocabulary, or a bound if no config states it."""
    path = next(filter(None, map(source.find, CONFIGS)), None)
    values = {} if path is None else read_object(path, _MAX_BYTES)
    size, multiple = values.get("vocab_size"), values.get("pad_vocab_size_multiple", 8)
    if type(size) is not int or size < 1:
        return 2**31
    if "model_type" in values and "hidden_size" in values:
        return size  # transformers counts the rows that pad the vocabulary.
    return -(-size // multiple) * multiple if type(multiple) is int and multiple > 0 else size
