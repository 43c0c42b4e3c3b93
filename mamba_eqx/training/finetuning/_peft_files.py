"""LoRA in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._atomic import replaced_files
from ..._dtypes import at_least_float32
from ...formats import (
    CheckpointError,
    StoredTensor,
    open_safetensors,
    quote,
    read_config,
    write_safetensors,
)
from ...layers import Stacked
from ...models import LanguageModel
from ...pretrained import (
    Fields,
    Hub,
    Slot,
    Source,
    assign,
    config_from,
    get_layout,
    listing,
    open_source,
    rename,
    rename_tensors,
    skeleton,
    state_dict,
)
from ._lora import LoRA, LoRAPair, adaptable_layers


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYERS = "layers.layers."
_PREFIX = "base_model.model."


# Fields of PEFT's config that concern further training, or the origin of the base model.
_IGNORED = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout megatron_config megatron_core
    peft_version qalora_group_size revision target_modules task_type
    """.split()  # noqa: SIM905
)


# Initialisations that leave the base weights unchanged.
_SUPPORTED_INITS = [True, False, "gaussian", "eva", "orthogonal"]


def save_lora(
    lora: LoRA,
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    layout: str = "transformers",
    base_model: str | None = None,
) -> None:
    """Saves a LoRA in the format of PEFT, for [`mamba_eqx.training.load_lora`][] or PEFT to load.

    In transformers' models `mamba`, `mamba2`, `falcon_mamba`, `falcon_h1` and `nemotron_h`, PEFT
    (0.21) refuses every `out_proj`, and a change of `dt_proj` has no effect until
    `merge_and_unload`, because transformers (5.24) reads this weight directly and bypasses PEFT's
    wrapper. To use PEFT, leave
    both layers out of `targets`.

    Both files appear together, and replace those of another LoRA in the folder.

    The format has no names for models other than `LanguageModel`s. Save their pairs with
    `equinox.tree_serialise_leaves`.

    **Arguments:**

    - `lora`: the LoRA.
    - `model`: the model that the LoRA was initialised for, with its layers `Unrolled` or `Stacked`.
    - `path`: the folder to save to, which is created if it does not exist.
    - `layout`: the layout whose names are used; see [`mamba_eqx.save_pretrained`][].
    - `base_model`: the name or the folder from which PEFT loads the model.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot store the model; `ValueError`
    if the LoRA does not fit the model; `FileExistsError` if `path` is a file.
    """
    targets = _targets(model, layout)
    jax.eval_shape(lora.merge, model)  # Raises if the LoRA does not fit the model.
    pairs = lora.pairs
    if isinstance(model.layers, Stacked):
        pairs = _unstacked(pairs, model.layers.n_layer)
    # PEFT has one rank for all pairs, so those of a lower rank are padded with zeros.
    rank = max(pair.a.shape[-2] for pair in pairs.values())
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for name, target in targets.items():
        if name not in pairs:
            continue
        pair = pairs[name]
        more = rank - pair.a.shape[-2]
        a = np.pad(np.asarray(pair.a), ((0, more), (0, 0)))
        b = np.pad(np.asarray(pair.b), ((0, 0), (0, more)))
        for slot in target.slots:
            modules.append(_module_name(slot))
            # PEFT has the factors of an embedding in the order in which a token meets them.
            stored = (b.T, a.T) if target.is_embedding else (a, slot.to_file(b))
            tensors |= zip(_tensor_names(slot, target), stored, strict=True)
    alpha = lora.scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    with replaced_files(path, last=(_CONFIG,)) as folder:
        write_safetensors(folder / _WEIGHTS, tensors, {"format": "pt"})
        (folder / _CONFIG).write_text(text, "utf-8")


def load_lora(
    path: str | os.PathLike[str], model: LanguageModel, *, layout: str = "transformers"
) -> LoRA:
    """Loads a LoRA saved by [`mamba_eqx.training.save_lora`][] or by PEFT.

    One projection of the model may be several in the layout, such as `q_proj`, `k_proj` and
    `v_proj` of attention. If their pairs differ in `A`, they are joined into one pair, whose rank
    is the sum of their ranks and which computes the same function.

    A pair of the embedding changes the embedding alone, as PEFT's own models do, even if the head
    is tied to it; see [`mamba_eqx.training.LoRA`][]. Base weights that PEFT stores beside such a
    pair must equal those of the model.

    **Arguments:**

    - `path`: the folder to load from.
    - `model`: the model that the LoRA was initialised for, with its layers `Unrolled` or `Stacked`.
    - `layout`: the layout whose names the files use.

    **Returns:**

    The LoRA, with pairs in float32 or wider.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the files are damaged, do not fit the model, or
    use options of PEFT beyond plain LoRA (DoRA, trained biases, different ranks);
    `FileNotFoundError` if a file is missing.
    """
    # A `Path` is never taken for a repository, and links may not leave the folder.
    source = open_source(Path(path), Hub())
    rank, scale = _read_config(_find(source, _CONFIG))
    modules = get_layout(layout).modules(config_from(model))
    # An adapter of the original code of a model type may have the names of the layout.
    older = {_PREFIX + name: _PREFIX + of_module for name, of_module in modules.items()}
    stored = rename_tensors(older, open_safetensors(_find(source, _WEIGHTS)))
    layers = adaptable_layers(model)
    pairs: dict[str, LoRAPair] = {}
    faults: list[str] = []
    for layer, target in _targets(model, layout).items():
        found: list[_StoredPair] = []
        for slot in target.slots:
            names = _tensor_names(slot, target)
            two = [stored.pop(name, None) for name in names]
            rows, columns = slot.file_shape(target.weight)
            if target.is_embedding:
                rows, columns = columns, rows
            wanted = [(rank, columns), (rows, rank)]
            for name, tensor, shape in zip(names, two, wanted, strict=True):
                if tensor is None and two != [None, None]:
                    faults.append(f"{name} is missing")
                elif tensor is not None and tensor.shape != shape:
                    faults.append(f"{name} has shape {tensor.shape} instead of {shape}")
            if two[0] is not None and two[1] is not None:
                found.append(_StoredPair(slot, two[0], two[1]))
            # PEFT stores the weights of embeddings and heads that it has changed.
            for base in (f"{_PREFIX}{_module_name(slot)}.base_layer.weight", _PREFIX + slot.name):
                if base in stored and layer in layers:
                    weight = np.asarray(layers[layer].weight)
                    if not _equals(stored.pop(base), weight):
                        faults.append(f"{base} differs from the model's weight")
        if found and not faults:
            whole = len(found) == len(target.slots)
            if target.is_embedding:
                a, b = (jnp.asarray(_read(factor).T) for factor in (found[0].b, found[0].a))
                pairs[layer] = LoRAPair(a, b)
            else:
                pairs[layer] = _join(found, target.weight.shape[0], whole=whole)
    faults += [f"{quote(name)} is unexpected" for name in stored]
    if faults or not pairs:
        raise CheckpointError(
            f"{source.where} does not fit the model in the {layout!r} layout: "
            f"{listing(faults) or 'it contains no pairs'}. Give the model that the LoRA was "
            "trained for."
        )
    if isinstance(model.layers, Stacked):
        pairs = _stacked(pairs, model.layers.n_layer)
    return LoRA(pairs, scale)


def _find(source: Source, name: str) -> Path:
    path = source.find(name)
    if path is None:
        raise FileNotFoundError(
            f"{source.where} has no {name}. Give the folder that `save_lora` or PEFT has written."
        )
    return path


def _equals(tensor: StoredTensor, weight: np.ndarray) -> bool:
    if tensor.shape != weight.shape:
        return False
    return np.array_equal(np.asarray(tensor.read()).astype(weight.dtype), weight)


def _read_config(path: Path) -> tuple[int, float]:
    """Returns the rank and the scale."""
    values = read_config(path)
    fields = Fields(values, _CONFIG)
    fields.only("peft_type", ["LORA"], None)
    fields.only("bias", ["none"], "none")
    fields.only("init_lora_weights", _SUPPORTED_INITS, True)
    fields.ignore(_IGNORED)
    # PEFT writes all its options. An option that is off changes nothing.
    options = values if isinstance(values, dict) else {}
    fields.ignore([key for key, value in options.items() if value in (None, False, {}, [])])
    rank = fields.size("r")
    by_root = fields.flag("use_rslora", False)
    scale = fields.number("lora_alpha", 8) / (rank**0.5 if by_root else rank)
    fields.finish()
    return rank, scale


class _StoredPair(NamedTuple):
    """The pair of a projection in the file."""

    slot: Slot
    a: StoredTensor
    b: StoredTensor


def _join(found: list[_StoredPair], rows: int, *, whole: bool) -> LoRAPair:
    """Joins the stored pairs of one weight.

    **Arguments:**

    - `found`: the pairs, in the order of their rows.
    - `rows`: the number of rows of the weight.
    - `whole`: whether the pairs cover all rows.
    """
    a = [_read(pair.a) for pair in found]
    b = [pair.slot.from_file(_read(pair.b)) for pair in found]
    if whole and all(np.array_equal(other, a[0]) for other in a):
        return LoRAPair(jnp.asarray(a[0]), jnp.asarray(np.concatenate(b)))
    rank = len(a[0])
    joined = np.zeros((rows, rank * len(found)), b[0].dtype)
    for i, pair in enumerate(found):
        covered = slice(*(pair.slot.rows or (0, rows)))
        joined[covered, i * rank : (i + 1) * rank] = b[i]
    return LoRAPair(jnp.asarray(np.concatenate(a)), jnp.asarray(joined))


def _read(tensor: StoredTensor) -> np.ndarray:
    """Reads a tensor in float32 or wider."""
    return np.asarray(tensor.read()).astype(at_least_float32(tensor.dtype))


class _Target(NamedTuple):
    """A layer, and the slots of its weight in a layout, with the names of modules."""

    weight: Float[Array, "out_features in_features"] | jax.ShapeDtypeStruct
    slots: list[Slot]
    is_embedding: bool


def _targets(model: LanguageModel, layout: str) -> dict[str, _Target]:
    """Returns every linear layer and embedding by its path in the model with `Unrolled` layers."""
    chosen, config = get_layout(layout), config_from(model)
    model_shapes, modules = skeleton(config), chosen.modules(config)
    shapes = jax.eval_shape(lambda tree: state_dict(tree, layout=layout), model_shapes)
    assignments = assign(chosen, config, model_shapes, shapes, floating=True)
    named = {
        found.path: [replace(slot, name=rename(modules, slot.name)) for slot, _ in found.parts]
        for found in assignments
    }
    return {
        path: _Target(layer.weight, named[f"{path}.weight"], isinstance(layer, eqx.nn.Embedding))
        for path, layer in adaptable_layers(model_shapes).items()
    }


def _module_name(slot: Slot) -> str:
    return slot.name.removesuffix(".weight")


def _tensor_names(slot: Slot, target: _Target) -> tuple[str, str]:
    """Returns the names of the two factors."""
    module = _PREFIX + _module_name(slot)
    if target.is_embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _unstacked(pairs: dict[str, LoRAPair], n_layer: int) -> dict[str, LoRAPair]:
    """Splits the pairs of `Stacked` layers into pairs of the same `Unrolled` layers."""
    found: dict[str, LoRAPair] = {}
    for path, pair in pairs.items():
        if not path.startswith(_LAYERS):
            found[path] = pair
            continue
        for i in range(n_layer):
            own = jax.tree.map(lambda leaf: leaf[i], pair)  # noqa: B023
            found[f"{_LAYERS}{i}.{path.removeprefix(_LAYERS)}"] = own
    return found


def _stacked(pairs: dict[str, LoRAPair], n_layer: int) -> dict[str, LoRAPair]:
    """Stacks the pairs of `Unrolled` layers, the inverse of `_unstacked`."""
    found = {path: pair for path, pair in pairs.items() if not path.startswith(_LAYERS)}
    layers: dict[str, dict[int, LoRAPair]] = {}
    for path, pair in pairs.items():
        if path.startswith(_LAYERS):
            i, _, within = path.removeprefix(_LAYERS).partition(".")
            layers.setdefault(within, {})[int(i)] = pair
    for within, by_layer in layers.items():
        ranks = {pair.a.shape[0] for pair in by_layer.values()}
        if len(by_layer) != n_layer or len(ranks) != 1:
            raise CheckpointError(
                f"A `Stacked` model must have a pair of the same rank in each of its {n_layer} "
                f"layers, but {within} has pairs in the layers {sorted(by_layer)}, of ranks "
                f"{sorted(ranks)}. Load them into the `Unrolled` model."
            )
        ordered = [by_layer[i] for i in range(n_layer)]
        found[_LAYERS + within] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return found
