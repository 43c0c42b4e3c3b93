from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_positive
from .._dtypes import at_least_float32, default_dtype
from ..layers import AbstractStack, Linear, check_reset_and_length, norm, product


class LanguageModel(eqx.Module):
    r"""A language model: an embedding, a stack of sequence layers, a norm and a head.

    It has the verbs of a sequence layer, over tokens: `model(tokens)`, `model.scan(tokens, state)`
    and `model.step(token, state)`, which return logits. They obey the same laws; see
    [`mamba_eqx.AbstractSequenceLayer`][].

    The rows of the embedding may be padded beyond `vocab_size`. The logits have a column for each
    row, padded ones included, as in the official models: padded rows were never trained, and must
    not be sampled.

    Reference: official `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`.
    """

    embedding: eqx.nn.Embedding
    layers: AbstractStack[Any]
    norm_f: eqx.nn.RMSNorm | eqx.nn.LayerNorm
    lm_head: Linear | None
    vocab_size: int = eqx.field(static=True)
    residual_in_fp32: bool = eqx.field(static=True)

    def __init__(
        self,
        layers: AbstractStack[Any],
        *,
        vocab_size: int,
        padded_vocab_size: int | None = None,
        tie_embeddings: bool = True,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `layers`: the layers, usually [`mamba_eqx.Block`][]s.
        - `vocab_size`: the number of tokens.
        - `padded_vocab_size`: the number of rows of the embedding (and of an untied head);
            `vocab_size` by default. Official models round it up to a multiple of 8 or 16.
        - `tie_embeddings`: whether the head is the embedding, transposed.
        - `rms_norm`, `norm_eps`: of the final norm; see [`mamba_eqx.Block`][].
        - `residual_in_fp32`: whether the residual stream is at least float32, whatever the dtype
            of the parameters.
        - `dtype`: of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: for the initial parameters: a normal distribution of standard deviation 0.02 for
            the embedding, uniform within `±1/sqrt(d_model)` for an untied head.
        """
        check_positive("vocab_size", vocab_size)
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        check_positive("padded_vocab_size", rows)
        if rows < vocab_size:
            raise ValueError(
                f"`padded_vocab_size` must be at least `vocab_size`, but got {rows} rows for "
                f"vocab_size={vocab_size}."
            )
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        embedding_key, head_key = jr.split(key)
        d_model = layers.d_model
        weight = 0.02 * jr.normal(embedding_key, (rows, d_model), dtype)
        self.embedding = eqx.nn.Embedding(weight=weight)
        self.layers = layers
        self.norm_f = norm(d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        if tie_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Linear(d_model, rows, use_bias=False, dtype=dtype, key=head_key)
        self.vocab_size = vocab_size
        self.residual_in_fp32 = residual_in_fp32

    @property
    def d_model(self) -> int:
        return self.layers.d_model

    @property
    def padded_vocab_size(self) -> int:
        return self.embedding.num_embeddings

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """The state of the layers that stands for the empty past."""
        return self.layers.init_state(max_len=max_len)

    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.padded_vocab_size}"]:
        """The logits of the token after each token of a whole sequence.

        **Arguments:**

        - `tokens`, `reset`, `length`: as for `scan`.
        - `key`: ignored; accepted for compatibility with other Equinox modules.
        """
        logits, _ = self.scan(tokens, reset=reset, length=length)
        return logits

    @jax.named_scope("mamba_eqx.LanguageModel.scan")
    def scan(
        self,
        tokens: Int[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.padded_vocab_size}"], PyTree]:
        """Runs a piece of a sequence.

        **Arguments:**

        - `tokens`: within `0..vocab_size - 1`.
        - `state`, `reset`, `length`: see [`mamba_eqx.AbstractSequenceLayer.scan`][].

        **Returns:**

        The logits of the token after each token, at least in float32, and the state.
        """
        features, state = self.backbone(tokens, state, reset=reset, length=length)
        return self.logits(features), state

    @jax.named_scope("mamba_eqx.LanguageModel.step")
    def step(
        self, token: Int[Array, ""], state: PyTree
    ) -> tuple[Float[Array, " {self.padded_vocab_size}"], PyTree]:
        """Runs one token.

        **Arguments:**

        - `token`: within `0..vocab_size - 1`.
        - `state`: what came before it.

        **Returns:**

        The logits of the token after it, at least in float32, and the state.
        """
        features, state = self.backbone_step(token, state)
        return self.logits(features), state

    def backbone(
        self,
        tokens: Int[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree]:
        """`scan` without its last step: the features that `logits` turns into logits.

        With a large vocabulary the head is a third of the work, so that a prefill, which needs
        the logits of its last token only, runs this and applies `logits` once.
        """
        _check_tokens("scan", tokens, 1)
        check_reset_and_length("LanguageModel", tokens.shape[0], reset, length)
        x, state = self.layers.scan(self._embed(tokens), state, reset=reset, length=length)
        return jax.vmap(self.norm_f)(x), state

    def backbone_step(
        self, token: Int[Array, ""], state: PyTree
    ) -> tuple[Float[Array, " {self.d_model}"], PyTree]:
        """`step` without its last step: the features that `logits` turns into logits."""
        _check_tokens("step", token, 0)
        x, state = self.layers.step(self._embed(token), state)
        return self.norm_f(x), state

    def logits(
        self, features: Float[Array, "*seq {self.d_model}"]
    ) -> Float[Array, "*seq {self.padded_vocab_size}"]:
        """The head, on the features of one token or of several."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return product(weight, features.astype(weight.dtype), dtype=at_least_float32(weight))

    def hidden_states(
        self,
        tokens: Int[Array, " seq"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "{self.layers.n_layer}+1 seq {self.d_model}"]:
        """The residual stream after each layer, and last of all after `norm_f`.

        **Arguments:** as for `scan`.
        """
        _check_tokens("scan", tokens, 1)
        hidden = self.layers.hidden_states(self._embed(tokens), reset=reset, length=length)
        return jnp.concatenate([hidden, jax.vmap(self.norm_f)(hidden[-1])[None]])

    def _embed(self, tokens: Int[Array, "*seq"]) -> Float[Array, "*seq {self.d_model}"]:
        weight = self.embedding.weight
        dtype = at_least_float32(weight) if self.residual_in_fp32 else weight.dtype
        return weight[tokens].astype(dtype)


def _check_tokens(verb: str, tokens: Array, ndim: int) -> None:
    if tokens.ndim != ndim:
        wanted = (
            "one token, of shape ()" if ndim == 0 else "one sequence of tokens, of shape (seq,)"
        )
        raise ValueError(
            f"`LanguageModel.{verb}` takes {wanted}, but got an array of shape {tokens.shape}. "
            "For a batch use `jax.vmap`."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`LanguageModel.{verb}` takes integer tokens, but got {tokens.dtype}. "
            "Text has to be tokenized first."
        )
