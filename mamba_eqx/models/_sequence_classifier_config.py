import dataclasses

from jax import random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._checks import check_positive
from ..layers import Remat
from ._config_fields import set_fields
from ._config_json import classifier_fields_from_json, to_json
from ._language_model_config import LanguageModelConfig
from ._sequence_classifier import SequenceClassifier


@dataclasses.dataclass(frozen=True)
class SequenceClassifierConfig:
    """The config of a [`mamba_eqx.SequenceClassifier`][].

    ```python
    import jax.random as jr
    import mamba_eqx as mbx

    backbone = mbx.LanguageModelConfig(256, (mbx.BlockConfig(mbx.Mamba1Config(16)),) * 2)
    classifier = mbx.SequenceClassifierConfig(backbone, n_classes=3).build(key=jr.key(0))
    ```

    **Raises:** `ValueError` if `backbone` is not a config of a language model, or `n_classes` is
    not a positive integer.
    """

    backbone: LanguageModelConfig
    """The config of the language model. `tie_embeddings` is set to true: a backbone has no head, so
    that configs of equal models are equal."""

    n_classes: int
    """The number of classes."""

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, LanguageModelConfig):
            raise ValueError(
                "`backbone` must be a `LanguageModelConfig`, but got "
                f"{type(self.backbone).__name__}. Read that of a model by "
                "`LanguageModelConfig.of(model)`."
            )
        check_positive("n_classes", self.n_classes)
        set_fields(self, backbone=dataclasses.replace(self.backbone, tie_embeddings=True))

    def build(
        self,
        *,
        stacked: bool = False,
        remat: Remat = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> SequenceClassifier:
        """Makes a new model.

        **Arguments:**

        - `stacked`, `remat`, `dtype`: see [`mamba_eqx.LanguageModelConfig.build`][].
        - `key`: the random key for the initial parameters.

        **Returns:**

        The model.
        """
        model_key, score_key = jr.split(key)
        model = self.backbone.build(stacked=stacked, remat=remat, dtype=dtype, key=model_key)
        return SequenceClassifier(model, n_classes=self.n_classes, key=score_key)

    @classmethod
    def of(cls, model: SequenceClassifier) -> "SequenceClassifierConfig":
        """Reads the config of an existing model.

        **Arguments:**

        - `model`: the model, or a pytree of its structure, as for
            [`mamba_eqx.LanguageModelConfig.of`][]. The weight of `score` must be there.

        **Returns:**

        The config, which builds a model of the same structure and shapes.

        **Raises:** `ValueError` if no config builds such a model.
        """
        return cls(LanguageModelConfig.of(model.backbone), model.n_classes)

    def to_json(self) -> str:
        """Converts the config to JSON, which `from_json` reads.

        **Returns:**

        A JSON object with a key for each field.
        """
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "SequenceClassifierConfig":
        """Reads a config that `to_json` wrote.

        **Arguments:**

        - `text`: a JSON object.

        **Returns:**

        The config.

        **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or invalid.
        """
        return cls(**classifier_fields_from_json(text, cls, LanguageModelConfig))
