from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._checks import positive_float
from ._arguments import check_layer, check_token, checked_sequence
from ._norm import Norm, make_norm
from ._protocol import AbstractSequenceLayer, Length, Reset, State
from ._scaled import scaled
from .mlps import AbstractMLP, MixtureOfExperts, Routes


TokenMap: TypeAlias = Callable[[Float[Array, " d_model"]], Float[Array, " d_model"]]


class Block(AbstractSequenceLayer[State]):
    r"""A mixer, and optionally an MLP on every token, in a pre-norm residual stream,

    $$x \leftarrow x + \rho\, \mathrm{mixer}(\mathrm{norm}(x)), \qquad
      x \leftarrow x + \rho\, \mathrm{mlp}(\mathrm{norm2}(x)),$$

    where $\rho$ is the number `residual_multiplier`, 1 except in models like Granite 4.

    The sum keeps the dtype of the residual stream. The official models keep the stream in float32
    even if everything else is bfloat16 (`residual_in_fp32`), and so does
    [`mamba_eqx.LanguageModel`][]. The norms read the stream at full precision, as the official
    fused kernel does. The state of a block is the state of its mixer.

    Reference: official `mamba_ssm.modules.block.Block`.
    """

    norm: Norm
    mixer: AbstractSequenceLayer[State]
    norm2: Norm | None
    mlp: AbstractMLP | TokenMap | None
    residual_multiplier: float = eqx.field(static=True)

    def __init__(
        self,
        mixer: AbstractSequenceLayer[State],
        *,
        mlp: AbstractMLP | TokenMap | None = None,
        residual_multiplier: float = 1.0,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `mixer`: any sequence layer.
        - `mlp`: a [`mamba_eqx.layers.AbstractMLP`][] such as [`mamba_eqx.GatedMLP`][], or any
            module that maps one token of shape `(d_model,)` to another; `None` for a block without
            an MLP.
        - `residual_multiplier`: a positive number that multiplies the outputs of the mixer and of
            the MLP before they are added to the residual stream.
        - `rms_norm`: whether the norms are RMSNorm, rather than LayerNorm.
        - `norm_eps`: a number between 0 and 1 that the norms add to the mean square (or to the
            variance).
        - `dtype`: the dtype of the norms' parameters; float32 by default (float64 in JAX's 64-bit
            mode).

        **Raises:** `ValueError` if `norm_eps` is not between 0 and 1, `rms_norm` is not a bool,
        `residual_multiplier` is not a positive number, the mixer or the MLP is a config instead of
        a layer, or the mixer and an MLP of this library differ in `d_model`.
        """
        check_layer("mixer", mixer)
        if mlp is not None:
            check_layer("mlp", mlp)
        residual_multiplier = positive_float("residual_multiplier", residual_multiplier)
        if isinstance(mlp, AbstractMLP) and mlp.d_model != mixer.d_model:
            raise ValueError(
                "The mixer and the MLP of `Block` must share `d_model`, but got "
                f"d_model={mixer.d_model} and d_model={mlp.d_model}."
            )
        self.norm = make_norm(mixer.d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        self.mixer = mixer
        if mlp is None:
            self.norm2 = None
        else:
            self.norm2 = make_norm(mixer.d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        self.mlp = mlp
        self.residual_multiplier = residual_multiplier

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.mixer.d_model

    def init_state(self, *, max_len: int | None = None) -> State:
        """Returns the mixer's initial state."""
        return self.mixer.init_state(max_len=max_len)

    @jax.named_scope("mamba_eqx.Block.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("Block", self.d_model, x, reset, length)
        x, state, _ = self._run(x, state, reset, length)
        return x, state

    @jax.named_scope("mamba_eqx.Block.scan")
    def scan_with_routes(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State, tuple[Routes, ...]]:
        """Runs `scan`, and also returns which experts the MLP chose.

        **Arguments:** as for `scan`.

        **Returns:**

        The outputs and the state of `scan`, and a tuple of the
        [`mamba_eqx.layers.Routes`][] of a [`mamba_eqx.MixtureOfExperts`][], empty for any other
        MLP. The routes of padding are arbitrary.

        **Raises:** `ValueError` as `scan` does.
        """
        x = checked_sequence("Block", self.d_model, x, reset, length, verb="scan_with_routes")
        return self._run(x, state, reset, length)

    def _run(
        self, x: Array, state: State | None, reset: Reset, length: Length
    ) -> tuple[Array, State, tuple[Routes, ...]]:
        y, state = self.mixer.scan(jax.vmap(self.norm)(x), state, reset=reset, length=length)
        x += scaled(y, self.residual_multiplier)
        if self.mlp is None or self.norm2 is None:
            return x, state, ()
        tokens, routes = jax.vmap(self.norm2)(x), ()
        if isinstance(self.mlp, MixtureOfExperts):
            y, *routes = self.mlp.with_routes(tokens)
        elif isinstance(self.mlp, AbstractMLP):
            y = self.mlp(tokens)
        else:
            y = jax.vmap(self.mlp)(tokens)  # Any other module is a map of one token.
        return x + scaled(y, self.residual_multiplier), state, tuple(routes)

    @jax.named_scope("mamba_eqx.Block.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: State
    ) -> tuple[Float[Array, " {self.d_model}"], State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Block", self.d_model, x)
        y, state = self.mixer.step(self.norm(x), state)
        x += scaled(y, self.residual_multiplier)
        if self.mlp is None or self.norm2 is None:
            return x, state
        return x + scaled(self.mlp(self.norm2(x)), self.residual_multiplier), state
