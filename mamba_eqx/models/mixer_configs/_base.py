import abc
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from ...layers import AbstractSequenceLayer


Mixer = TypeVar("Mixer", bound=AbstractSequenceLayer[PyTree])


class AbstractMixerConfig(abc.ABC, Generic[Mixer]):
    """The architecture of a mixer. Subclasses are frozen dataclasses, one for each mixer.

    The fields are arguments of the mixer. Defaults are computed when the config is made, and
    options without an effect are set to their defaults, so that configs of equal architectures are
    equal. `kind` is the name of the mixer in JSON.
    """

    kind: ClassVar[str]
    mixer_type: Callable[..., Mixer]
    d_model: int

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Mixer:
        """Makes a new mixer, initialised as in the official code.

        **Arguments:**

        - `residual_scale`, `dtype`, `key`: the arguments of the mixer of the same names; see
            [`mamba_eqx.Mamba1`][].

        **Returns:**

        The mixer.
        """
        return self.mixer_type(**vars(self), residual_scale=residual_scale, dtype=dtype, key=key)

    @classmethod
    @abc.abstractmethod
    def of(cls, mixer: Mixer) -> "AbstractMixerConfig[Mixer]":
        """Reads the config of an existing mixer.

        **Arguments:**

        - `mixer`: the mixer, or a pytree of its structure, with any arrays or
            `jax.ShapeDtypeStruct`s. Arrays may also be left out (`None`), except for biases: a
            missing bias is read as a layer without a bias.

        **Returns:**

        The config, which builds a mixer of the same structure and shapes.

        **Raises:** `ValueError` if no config builds such a mixer.
        """
