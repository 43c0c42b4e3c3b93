import abc
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import AbstractMLP


Map = TypeVar("Map", bound=AbstractMLP)


class AbstractMLPConfig(abc.ABC, Generic[Map]):
    """The architecture of an MLP. Subclasses are frozen dataclasses, one for each MLP.

    The fields are arguments of the MLP, except for `d_model`, which a block has from its mixer.
    `kind` is the name of the MLP in JSON.
    """

    kind: ClassVar[str]
    mlp_type: Callable[..., Map]

    def build(
        self,
        d_model: int,
        *,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> Map:
        """Makes a new MLP, initialised as in the official code.

        **Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `residual_scale`, `dtype`, `key`: the arguments of the MLP of the same names; see
            [`mamba_eqx.GatedMLP`][].

        **Returns:**

        The MLP.
        """
        return self.mlp_type(
            d_model, **vars(self), residual_scale=residual_scale, dtype=dtype, key=key
        )

    @classmethod
    @abc.abstractmethod
    def of(cls, mlp: Map) -> "AbstractMLPConfig[Map]":
        """Reads the config of an existing MLP.

        **Arguments:**

        - `mlp`: the MLP, or a pytree of its structure, with any arrays or
            `jax.ShapeDtypeStruct`s. Arrays may also be left out (`None`), except for biases: a
            missing bias is read as a layer without a bias.

        **Returns:**

        The config. Whether it builds an MLP of the same shapes is checked by
        [`mamba_eqx.BlockConfig.of`][].
        """
