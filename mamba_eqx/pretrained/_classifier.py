"""Loading and saving sequence classifiers, in the layout of transformers."""

import dataclasses
import os
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike

from ..formats import CheckpointError, read_config
from ..layers import Linear
from ..models import SequenceClassifier
from ..text import ByteTokenizer, TextTokenizer
from ._arrays import check_dtype, to_jax
from ._checkpoint import read_checkpoint
from ._companions import Companions, companions_of
from ._hub import Hub
from ._load import SCORE, load
from ._save import ClassifierHead, save_checkpoint
from ._source import CONFIG, Source, open_source
from .layouts import TRANSFORMERS, config_from


def load_classifier(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
) -> tuple[SequenceClassifier, tuple[str, ...]]:
    """Loads a sequence classifier in the layout of transformers, such as that of
    `JambaForSequenceClassification`.

    ```python
    classifier = mbx.SequenceClassifier(model, n_classes=2, key=jr.key(0))
    mbx.save_classifier(classifier, "runs/classifier", labels=["no", "yes"])
    classifier, labels = mbx.load_classifier("runs/classifier")
    ```

    Everything is checked as in [`mamba_eqx.from_pretrained`][]. To give a language model a new head
    instead, call [`mamba_eqx.SequenceClassifier`][] with it.

    **Arguments:**

    - `name_or_path`, `dtype`, `revision`, `token`, `cache_dir`, `local_files_only`,
        `force_download`, `endpoint`: see [`mamba_eqx.from_pretrained`][].

    **Returns:**

    The classifier, with its layers in an [`mamba_eqx.Unrolled`][]; and the names of the classes, in
    the order of the logits (`id2label` of the config, or else `"LABEL_0"` and so on).

    **Raises:** [`mamba_eqx.CheckpointError`][] for a checkpoint of a language model, or one that is
    incomplete, damaged, of an unsupported architecture or cannot be downloaded; `FileNotFoundError`
    and `ValueError` as [`mamba_eqx.from_pretrained`][] does.
    """
    wanted = None if dtype is None else check_dtype("The model", dtype)
    if wanted is not None and not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"`dtype` must be a floating-point dtype, but got {wanted}.")
    hub = Hub(revision, token, cache_dir, local_files_only, force_download, endpoint)
    source = open_source(name_or_path, hub)
    checkpoint = read_checkpoint(source)
    tensors = dict(checkpoint.tensors)
    score = tensors.pop(SCORE, None)
    if score is None:
        raise CheckpointError(
            f"{checkpoint.where} has no {SCORE}, so that it is no sequence classifier. Load a "
            "language model with `from_pretrained`, and give it a head with `SequenceClassifier`."
        )
    config, where = checkpoint.config, f"{checkpoint.where}: {SCORE}"
    shape = tuple(score.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != config.d_model:
        raise CheckpointError(
            f"{where} must be of shape (n_classes, {config.d_model}), but is {shape}. Use the "
            "config and the weights of the same model."
        )
    if not jnp.issubdtype(score.dtype, jnp.floating):
        raise CheckpointError(f"{where} must be of a floating-point dtype, but is {score.dtype}.")
    labels = _labels(source, shape[0])
    # A classifier has no head for tokens, whatever its config says.
    config = dataclasses.replace(config, tie_embeddings=True)
    model = load(dataclasses.replace(checkpoint, config=config, tensors=tensors), wanted)
    target = check_dtype(SCORE, score.dtype if wanted is None else wanted)
    weight = to_jax(SCORE, [score.read()], shape, target)
    made = SequenceClassifier(model, n_classes=1, key=jr.key(0))
    return eqx.tree_at(lambda made: made.score, made, Linear.of(weight)), labels


def _labels(source: Source, n_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes.

    **Raises:** `CheckpointError` if the config has names of other classes.
    """
    path = source.find(CONFIG)
    values = None if path is None else read_config(path)
    found = values.get("id2label") if isinstance(values, dict) else None
    if found is None:
        return tuple(f"LABEL_{i}" for i in range(n_classes))
    names = [found.get(str(i)) for i in range(n_classes)] if isinstance(found, dict) else []
    labels = tuple(name for name in names if isinstance(name, str))
    if not isinstance(found, dict) or len(labels) != n_classes or len(found) != n_classes:
        raise CheckpointError(
            f"{path}: `id2label` must have a name for each of the {n_classes} classes of {SCORE}, "
            f"with the keys '0' to '{n_classes - 1}'. Use the config and the weights of the same "
            "model, or remove `id2label`."
        )
    return labels


def save_classifier(
    model: SequenceClassifier,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    max_shard_size: int | str | None = "5GB",
    tokenizer: TextTokenizer | ByteTokenizer | None = None,
) -> None:
    """Saves a sequence classifier as a checkpoint that `load_classifier` loads, in the layout of
    transformers.

    transformers has a class for sequence classification with the models of Jamba only, and loads
    those. Classifiers of other families are written in the same way, for this library. A model that
    transformers' layout cannot store, such as one of Mamba-3, can be saved by
    `equinox.tree_serialise_leaves`, and its config by `SequenceClassifierConfig.to_json`.

    The folder is replaced as a whole, as by [`mamba_eqx.save_pretrained`][].

    **Arguments:**

    - `model`: the classifier.
    - `path`: the folder, which is created if necessary.
    - `labels`: the names of the classes, all different, in the order of the logits; by default
        `"LABEL_0"` and so on, as in transformers.
    - `max_shard_size`, `tokenizer`: see [`mamba_eqx.save_pretrained`][]. With a tokenizer the
        config declares the id of the padding, by which transformers finds the last real token.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot store the model, or `path`
    holds other weights that a reader might load instead; `FileExistsError` if `path` is a file;
    `ValueError` if `model` is not a classifier, `labels` are not one name for each class, or
    another argument is not valid.
    """
    if not isinstance(model, SequenceClassifier):
        raise ValueError(
            f"`model` must be a `SequenceClassifier`, but got {type(model).__name__}. Save a "
            "language model with `save_pretrained`."
        )
    if labels is None:
        labels = [f"LABEL_{i}" for i in range(model.n_classes)]
    if (
        isinstance(labels, str)
        or len(labels) != model.n_classes
        or len(set(labels)) != len(labels)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise ValueError(
            f"`labels` must be {model.n_classes} different names, one for each class, but got "
            f"{labels!r}."
        )
    weight = model.score.weight
    if not isinstance(model.score, Linear) or weight.ndim != 2:
        raise CheckpointError(
            "`score` must be a `Linear` with a weight of shape (n_classes, d_model), but is a "
            f"{type(model.score).__name__} with one of shape {weight.shape}. Quantise the "
            "`backbone` alone, and take one model out of an ensemble first."
        )
    # Other layouts have no place for a classifier, so that none of them is a remedy.
    TRANSFORMERS.check(config_from(model.backbone))
    companions = Companions() if tokenizer is None else companions_of(tokenizer)
    save_checkpoint(
        model.backbone,
        path,
        companions,
        layout=TRANSFORMERS.name,
        max_shard_size=max_shard_size,
        head=ClassifierHead(weight, tuple(labels)),
    )
