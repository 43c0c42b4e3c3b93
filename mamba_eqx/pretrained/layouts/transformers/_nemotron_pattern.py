"""The layers of Nemotron-H, and the blocks that they are here.

A layer of the file is a mixer or an MLP, each after a norm of its own. A mixer and the MLP that
follows are one block.
"""

from .._fields import Fields
from .._tables import JSON
from ._family import Kind, Kinds, Pattern


_MIXERS = {"mamba": "M", "attention": "*"}
_MLPS = {"mlp": "-", "moe": "E"}
# The letters of a pattern by the names that older and newer versions have for the layers.
_LETTERS = _MIXERS | _MLPS | {"linear_attention": "M", "full_attention": "*"}


def _read_pattern(fields: Fields) -> Kinds:
    letters = fields.series("hybrid_override_pattern", {a: a for a in _LETTERS.values()})
    key = "layers_block_type" if letters is None else "hybrid_override_pattern"
    named = fields.series("layers_block_type", _LETTERS)
    if letters is None and named is None:
        raise fields.error("hybrid_override_pattern", "is required")
    if letters is not None and named is not None and letters != named:
        raise fields.error("layers_block_type", "must agree with `hybrid_override_pattern`")
    letters = letters or named or []
    if fields.count("num_hidden_layers", len(letters)) != len(letters):
        raise fields.error("num_hidden_layers", f"must be the length of `{key}`, {len(letters)}")
    mixers, mlps = ({letter: name for name, letter in of.items()} for of in (_MIXERS, _MLPS))
    kinds: list[Kind] = []
    for i, letter in enumerate(letters):
        if letter in mixers:
            kinds.append(Kind(mixers[letter], None))
        elif kinds and kinds[-1].mlp is None:
            kinds[-1] = kinds[-1]._replace(mlp=mlps[letter])
        else:
            raise fields.error(key, f"must have a mixer directly before the MLP at index {i}")
    return kinds


def _write_pattern(kinds: Kinds) -> JSON:
    pattern = "".join(
        _MIXERS[kind.mixer] + ("" if kind.mlp is None else _MLPS[kind.mlp]) for kind in kinds
    )
    return {"num_hidden_layers": len(pattern), "hybrid_override_pattern": pattern}


def places(kinds: Kinds) -> list[tuple[int, int]]:
    """Returns the indices of the layers that hold the mixer and the MLP of each block."""
    places: list[tuple[int, int]] = []
    for kind in kinds:
        mixer = places[-1][1] + 1 if places else 0
        places.append((mixer, mixer if kind.mlp is None else mixer + 1))
    return places


# Every sequence of kinds has a pattern.
PATTERN = Pattern(_read_pattern, _write_pattern, lambda kinds: None)
