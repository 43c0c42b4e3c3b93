from collections.abc import Callable
from typing import TypeAlias

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._arguments import check_token, checked_sequence
from ._norm import Norm, make_norm
from ._protocol import AbstractSequenceLayer, Length, Reset, State


TokenMap: TypeAlias = Callable[[Float[Array, " d_model"]], Float[Array, " d_model"]]


class Block(AbstractSequenceLayer[State]):
    r"""A mixer, and optionally an MLP on every token, in a pre-norm residual stream,

    $$x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad
      x \leftarrow x + \mathrm{mlp}(\mathrm{norm2}(x)).$$

    The sum keeps the dtype of the residual stream. The official models keep the stream in float32
    even if everything else is bfloat16 (`residual_in_fp32`), and so does
    [`mamba_eqx.LanguageModel`][]. The norms read the stream at full precision, as the official
    fused kernel does. The state of a block is the state of its mixer.

    Reference: official `mamba_ssm.modules.block.Block`.
    """

    norm: Norm
    mixer: AbstractSequenceLayer[State]
    norm2: Norm | None
    mlp: TokenMap | None

    def __init__(
        self,
        mixer: AbstractSequenceLayer[State],
        *,
        mlp: TokenMap | None = None,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `mixer`: any sequence layer.
        - `mlp`: any module that maps one token of shape `(d_model,)` to another, for instance
            [`mamba_eqx.GatedMLP`][]; `None` for a block without an MLP.
        - `rms_norm`: whether the norms are RMSNorm, rather than LayerNorm.
        - `norm_eps`: a number between 0 and 1 that the norms add to the mean square (or to the
            variance).
        - `dtype`: the dtype of the norms' parameters; float32 by default (float64 in JAX's 64-bit
            mode).

        **Raises:** `ValueError` if `norm_eps` is not between 0 and 1, or `rms_norm` is not a bool.
        """
        self.norm = make_norm(mixer.d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        self.mixer = mixer
        if mlp is None:
            self.norm2 = None
        else:
            self.norm2 = make_norm(mixer.d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        self.mlp = mlp

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
        y, state = self.mixer.scan(jax.vmap(self.norm)(x), state, reset=reset, length=length)
        return jax.vmap(self._apply_mlp)(x + y), state

    @jax.named_scope("mamba_eqx.Block.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: State
    ) -> tuple[Float[Array, " {self.d_model}"], State]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Block", self.d_model, x)
        y, state = self.mixer.step(self.norm(x), state)
        return self._apply_mlp(x + y), state

    def _apply_mlp(self, x: Float[Array, " {self.d_model}"]) -> Float[Array, " {self.d_model}"]:
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.mlp(self.norm2(x))
