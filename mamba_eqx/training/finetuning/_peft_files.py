"""Low-rank adaptation in the files of PEFT: `adapter_config.json`, `adapter_model.safetensors`."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._dtypes import at_least_float32
from ...formats import (
    CheckpointError,
    StoredTensor,
    open_safetensors,
    read_config,
    write_safetensors,
)
from ...layers import Stacked
from ...models import LanguageModel
from ...pretrained import (
    Fields,
    Slot,
    assign,
    config_from,
    get_layout,
    listing,
    skeleton,
    state_dict,
)
from ._lora import LoRA, LoRAPair, linear_maps


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYERS = "layers.layers."


# Fields of PEFT's config that say how to train on, or where things came from.
_IGNORED = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout megatron_config megatron_core
    peft_version qalora_group_size revision target_modules task_type
    """.split()  # noqa: SIM905
)


# Initialisations that leave the base weights as they were.
_PLAIN_STARTS = [True, False, "gaussian", "eva", "orthogonal"]


def save_lora(
    lora: LoRA,
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    layout: str = "transformers",
    base_model: str | None = None,
) -> None:
    """Saves the pairs so that `load_lora` loads them, and that PEFT does.

    In transformers' models `mamba`, `mamba2` and `falcon_mamba` PEFT (0.21) refuses every
    `out_proj`. On `dt_proj`, whose weight transformers (5.24) reads past PEFT's wrapper, it has no
    effect until its `merge_and_unload`. For PEFT leave both out of `targets`.

    (A model that is no `LanguageModel` has no names there: save the pairs for it by
    `equinox.tree_serialise_leaves`.)

    **Arguments:**

    - `lora`: the pairs.
    - `model`: that they were made for, `Unrolled` or `Stacked`.
    - `path`: a folder, which is made if need be.
    - `layout`: whose names they get; see [`mamba_eqx.save_pretrained`][].
    - `base_model`: the name or the folder of the model, from which PEFT loads it.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot hold the model; `ValueError` if
    the pairs were made for another one.
    """
    table = _table(model, layout)
    jax.eval_shape(lora.merge, model)  # Its errors are ours.
    pairs = lora.pairs
    if isinstance(model.layers, Stacked):
        pairs = _unstacked(pairs, model.layers.n_layer)
    # PEFT has one rank for all: pairs of a lower one are filled up with zeros.
    rank = max(pair.a.shape[-2] for pair in pairs.values())
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for path_here, (_, parts) in table.items():
        if path_here not in pairs:
            continue
        pair = pairs[path_here]
        more = rank - pair.a.shape[-2]
        a = np.pad(np.asarray(pair.a), ((0, more), (0, 0)))
        b = np.pad(np.asarray(pair.b), ((0, 0), (0, more)))
        for slot in parts:
            modules.append(_module(slot))
            tensors[_tensor(slot, "A")] = a
            tensors[_tensor(slot, "B")] = slot.to_file(b)
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
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / _WEIGHTS, tensors, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", "utf-8")


def load_lora(
    path: str | os.PathLike[str], model: LanguageModel, *, layout: str = "transformers"
) -> LoRA:
    """Loads what `save_lora` or PEFT has saved.

    Where one projection here is several in the layout (`q_proj`, `k_proj` and `v_proj` of
    attention), pairs that differ in `A` are joined to one of the sum of their ranks: the same
    function.

    **Arguments:**

    - `path`: a folder.
    - `model`: that they were made for, `Unrolled` or `Stacked`.
    - `layout`: whose names they have.

    **Raises:** [`mamba_eqx.CheckpointError`][] for files that are damaged or do not fit the model,
    and for what PEFT has beyond plain LoRA (DoRA, trained biases, ranks that differ);
    `FileNotFoundError` if there is nothing at `path`.
    """
    folder = Path(path)
    rank, scale = _read_config(folder / _CONFIG)
    stored = open_safetensors(folder / _WEIGHTS)
    pairs: dict[str, LoRAPair] = {}
    faults: list[str] = []
    for path_here, (weight, parts) in _table(model, layout).items():
        found: list[_Found] = []
        for slot in parts:
            names = [_tensor(slot, which) for which in "AB"]
            two = [stored.pop(name, None) for name in names]
            rows, columns = slot.file_shape(weight)
            wanted = [(rank, columns), (rows, rank)]
            for name, tensor, shape in zip(names, two, wanted, strict=True):
                if tensor is None and two != [None, None]:
                    faults.append(f"{name} is missing")
                elif tensor is not None and tensor.shape != shape:
                    faults.append(f"{name} is {tensor.shape} and should be {shape}")
            if two[0] is not None and two[1] is not None:
                found.append((slot, two[0], two[1]))
        if found and not faults:
            pairs[path_here] = _joined(found, weight.shape[0], whole=len(found) == len(parts))
    faults += [f"{name} has no place" for name in stored]
    if faults or not pairs:
        raise CheckpointError(
            f"{os.fspath(folder)} does not fit the model, by the names of the {layout!r} layout: "
            f"{listing(faults) or 'it holds nothing'}. Give the model that it was made for."
        )
    if isinstance(model.layers, Stacked):
        pairs = _stacked(pairs, model.layers.n_layer)
    return LoRA(pairs, scale)


def _read_config(path: Path) -> tuple[int, float]:
    """The rank and the scale."""
    values = read_config(path)
    fields = Fields(values, _CONFIG)
    fields.only("peft_type", ["LORA"], None)
    fields.only("bias", ["none"], "none")
    fields.only("init_lora_weights", _PLAIN_STARTS, True)
    fields.ignore(_IGNORED)
    # PEFT writes out every option that it has; what is off changes nothing.
    options = values if isinstance(values, dict) else {}
    fields.ignore([key for key, value in options.items() if value in (None, False, {}, [])])
    rank = fields.size("r")
    by_root = fields.flag("use_rslora", False)
    scale = fields.number("lora_alpha", 8) / (rank**0.5 if by_root else rank)
    fields.finish()
    return rank, scale


_Found = tuple[Slot, StoredTensor, StoredTensor]


def _joined(found: list[_Found], rows: int, *, whole: bool) -> LoRAPair:
    """One pair of those that are parts of one weight, or of all its rows if `whole`."""
    a = [_wide(tensor) for _, tensor, _ in found]
    b = [_wide(tensor) for _, _, tensor in found]
    if whole and all(np.array_equal(other, a[0]) for other in a):
        return LoRAPair(jnp.asarray(a[0]), jnp.asarray(np.concatenate(b)))
    rank = len(a[0])
    joined = np.zeros((rows, rank * len(found)), b[0].dtype)
    for i, (slot, _, _) in enumerate(found):
        joined[slice(*(slot.rows or (0, rows))), i * rank : (i + 1) * rank] = b[i]
    return LoRAPair(jnp.asarray(np.concatenate(a)), jnp.asarray(joined))


def _wide(tensor: StoredTensor) -> np.ndarray:
    return np.asarray(tensor.read()).astype(at_least_float32(tensor.dtype))


def _table(model: LanguageModel, layout: str) -> dict[str, tuple[Any, list[Slot]]]:
    """The weight (its shape) and the names of every linear map, by its path in the model with its
    layers `Unrolled`."""
    config = config_from(model)
    model_shapes = skeleton(config)
    shapes = jax.eval_shape(lambda tree: state_dict(tree, layout=layout), model_shapes)
    assignments = assign(get_layout(layout), config, model_shapes, shapes, floating=True)
    named = {found.path: [slot for slot, _ in found.parts] for found in assignments}
    return {
        path: (linear.weight, named[f"{path}.weight"])
        for path, linear in linear_maps(model_shapes).items()
    }


def _module(slot: Slot) -> str:
    return slot.name.removesuffix(".weight")


def _tensor(slot: Slot, which: str) -> str:
    return f"base_model.model.{_module(slot)}.lora_{which}.weight"


def _unstacked(pairs: dict[str, LoRAPair], n_layer: int) -> dict[str, LoRAPair]:
    """The pairs of a model with `Stacked` layers under the paths of one with `Unrolled` ones."""
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
    """The inverse."""
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
                f"A `Stacked` model changes all of its {n_layer} layers alike, but for {within} "
                f"there are pairs for the layers {sorted(by_layer)}, of ranks {sorted(ranks)}. "
                "Load them into the `Unrolled` model."
            )
        ordered = [by_layer[i] for i in range(n_layer)]
        found[_LAYERS + within] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return found
