import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from .._checks import check_flag, check_positive, positive_float
from .._dtypes import at_least_float32, default_dtype
from .._explicit_axes import has_explicit_axes
from ..layers import (
    AbstractLinear,
    AbstractStack,
    Length,
    Linear,
    Norm,
    Reset,
    Routes,
    check_reset_and_length,
    make_norm,
    product,
    scaled,
)


class LanguageModel(eqx.Module):
    r"""A language model: an embedding, a stack of sequence layers, a norm and a head.

    The model has the methods of a sequence layer, over tokens: `model(tokens)`,
    `model.scan(tokens, state)` and `model.step(token, state)`, which return logits. These methods
    obey the laws of sequence layers; see [`mamba_eqx.AbstractSequenceLayer`][].

    The embedding may have more rows than `vocab_size`. As in the official models, there is a logit
    for each row, including these padding rows. Padding rows are not trained, and their token ids
    must not be sampled.

    Reference: official `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`.
    """

    embedding: eqx.nn.Embedding
    layers: AbstractStack[PyTree]
    norm_f: Norm
    lm_head: AbstractLinear | None
    vocab_size: int = eqx.field(static=True)
    residual_in_fp32: bool = eqx.field(static=True)
    embedding_multiplier: float = eqx.field(static=True)
    logits_multiplier: float = eqx.field(static=True)

    def __init__(
        self,
        layers: AbstractStack[PyTree],
        *,
        vocab_size: int,
        padded_vocab_size: int | None = None,
        tie_embeddings: bool = True,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        embedding_multiplier: float = 1.0,
        logits_multiplier: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `layers`: the layers, usually [`mamba_eqx.Block`][]s.
        - `vocab_size`: the number of token ids.
        - `padded_vocab_size`: the number of rows of the embedding (and of an untied head), at least
            `vocab_size`, which is the default. Official models round it up to a multiple of 8 or
            16.
        - `tie_embeddings`: whether the head is the transposed embedding.
        - `rms_norm`, `norm_eps`: the kind and the epsilon of the final norm; see
            [`mamba_eqx.Block`][].
        - `residual_in_fp32`: whether the residual stream is at least float32, whatever the dtype of
            the parameters.
        - `embedding_multiplier`, `logits_multiplier`: positive numbers that multiply the embedded
            tokens and the logits, 1 except in models like Granite 4 and Falcon-H1.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters: a normal distribution of standard
            deviation 0.02 for the embedding, uniform within `±1/sqrt(d_model)` for an untied head.

        **Raises:** `ValueError` if a size is not a positive integer, `padded_vocab_size` is less
        than `vocab_size`, an option is not a bool, `norm_eps` is not between 0 and 1, or a
        multiplier is not a positive number.
        """
        rows = check_vocab_size(vocab_size, padded_vocab_size)
        check_flag("tie_embeddings", tie_embeddings)
        check_flag("rms_norm", rms_norm)
        check_flag("residual_in_fp32", residual_in_fp32)
        self.embedding_multiplier = positive_float("embedding_multiplier", embedding_multiplier)
        self.logits_multiplier = positive_float("logits_multiplier", logits_multiplier)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        embedding_key, head_key = jr.split(key)
        d_model = layers.d_model
        weight = 0.02 * jr.normal(embedding_key, (rows, d_model), dtype)
        self.embedding = eqx.nn.Embedding(weight=weight)
        self.layers = layers
        self.norm_f = make_norm(d_model, rms_norm=rms_norm, eps=norm_eps, dtype=dtype)
        if tie_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Linear(d_model, rows, use_bias=False, dtype=dtype, key=head_key)
        self.vocab_size = vocab_size
        self.residual_in_fp32 = residual_in_fp32

    @property
    def d_model(self) -> int:
        """The number of features of the residual stream."""
        return self.layers.d_model

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of the embedding, which is the number of logits."""
        return self.embedding.num_embeddings

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """Returns the state of the empty past.

        **Arguments:**

        - `max_len`: the maximum number of tokens that will be run from this state. Layers with a
            cache need it; state-space models ignore it.

        **Returns:**

        The initial state of the layers.
        """
        return self.layers.init_state(max_len=max_len)

    def __call__(
        self,
        tokens: Integer[Array, " seq"],
        *,
        reset: Reset = None,
        length: Length = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.padded_vocab_size}"]:
        """Runs a whole sequence from the empty past.

        **Arguments:**

        - `tokens`, `reset`, `length`: as for `scan`.
        - `key`: ignored; accepted for compatibility with other Equinox modules.

        **Returns:**

        The logits of `scan`, an array of shape `(seq, padded_vocab_size)`.

        **Raises:** `ValueError` as `scan` does.
        """
        logits, _ = self.scan(tokens, reset=reset, length=length)
        return logits

    @jax.named_scope("mamba_eqx.LanguageModel.scan")
    def scan(
        self,
        tokens: Integer[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.padded_vocab_size}"], PyTree]:
        """Runs a piece of a sequence.

        **Arguments:**

        - `tokens`: token ids within `0..vocab_size - 1`, an integer array of shape `(seq,)`.
        - `state`, `reset`, `length`: see [`mamba_eqx.AbstractSequenceLayer.scan`][].

        **Returns:**

        The logits of the token that follows each token, an array of shape
        `(seq, padded_vocab_size)`, at least in float32; and the state after the last real token.

        **Raises:** `ValueError` if an argument has the wrong shape or dtype.
        """
        _check_tokens("scan", tokens, 1)
        features, state = self.backbone(tokens, state, reset=reset, length=length)
        return self.logits(features), state

    @jax.named_scope("mamba_eqx.LanguageModel.step")
    def step(
        self, token: Integer[Array, ""], state: PyTree
    ) -> tuple[Float[Array, " {self.padded_vocab_size}"], PyTree]:
        """Runs one token.

        **Arguments:**

        - `token`: a token id within `0..vocab_size - 1`, of shape `()`.
        - `state`: the state after the tokens before `token`.

        **Returns:**

        The logits of the token that follows, an array of shape `(padded_vocab_size,)`, at least in
        float32; and the state after `token`.

        **Raises:** `ValueError` if an argument has the wrong shape or dtype.
        """
        _check_tokens("step", token, 0)
        features, state = self.backbone_step(token, state)
        return self.logits(features), state

    def backbone(
        self,
        tokens: Integer[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree]:
        """Runs `scan` without the head.

        With a large vocabulary the head is a third of the work. A prefill needs the logits of the
        last token only, so that it can run the backbone and apply `logits` once.

        **Arguments:** as for `scan`.

        **Returns:**

        The features that `logits` converts to logits, an array of shape `(seq, d_model)`; and the
        state after the last real token.

        **Raises:** `ValueError` as `scan` does.
        """
        _check_tokens("backbone", tokens, 1)
        check_reset_and_length("LanguageModel", tokens.shape[0], reset, length)
        x, state = self.layers.scan(self.embed(tokens), state, reset=reset, length=length)
        return jax.vmap(self.norm_f)(x), state

    def backbone_with_routes(
        self,
        tokens: Integer[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree, tuple[Routes, ...]]:
        """Runs `backbone`, and also returns which experts the layers chose, for
        [`mamba_eqx.training.load_balancing_loss`][].

        **Arguments:** as for `scan`.

        **Returns:**

        The features and the state of `backbone`; and the [`mamba_eqx.layers.Routes`][] of every
        block with a [`mamba_eqx.MixtureOfExperts`][], first layer first, an empty tuple for a model
        without experts. The routes of padding are arbitrary.

        **Raises:** `ValueError` as `scan` does.
        """
        _check_tokens("backbone_with_routes", tokens, 1)
        check_reset_and_length("LanguageModel", tokens.shape[0], reset, length)
        x, state, routes = self.layers.scan_with_routes(
            self.embed(tokens), state, reset=reset, length=length
        )
        return jax.vmap(self.norm_f)(x), state, routes

    def backbone_step(
        self, token: Integer[Array, ""], state: PyTree
    ) -> tuple[Float[Array, " {self.d_model}"], PyTree]:
        """Runs `step` without the head.

        **Arguments:** as for `step`.

        **Returns:**

        The features that `logits` converts to logits, an array of shape `(d_model,)`; and the state
        after `token`.

        **Raises:** `ValueError` as `step` does.
        """
        _check_tokens("backbone_step", token, 0)
        x, state = self.layers.step(self.embed(token), state)
        return self.norm_f(x), state

    def logits(
        self, features: Float[Array, "*seq {self.d_model}"]
    ) -> Float[Array, "*seq {self.padded_vocab_size}"]:
        """Applies the head to the features of one token or of several.

        **Arguments:**

        - `features`: the result of `backbone` or `backbone_step`, of shape `(..., d_model)`.

        **Returns:**

        The logits, of shape `(..., padded_vocab_size)`, at least in float32.
        """
        if self.lm_head is None:
            weight = self.embedding.weight
            logits = product(weight, features.astype(weight.dtype), dtype=at_least_float32(weight))
        else:
            logits = self.lm_head(features, dtype=at_least_float32(self.lm_head.dtype))
        return scaled(logits, self.logits_multiplier)

    def hidden_states(
        self,
        tokens: Integer[Array, " seq"],
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Float[Array, "{self.layers.n_layer}+1 seq {self.d_model}"]:
        """Runs a whole sequence from the empty past, and returns the residual stream after each
        layer and after the final norm.

        **Arguments:**

        - `tokens`, `reset`, `length`: as for `scan`.

        **Returns:**

        An array of shape `(n_layer + 1, seq, d_model)`: the outputs of the layers, first layer
        first, and the output of the final norm.

        **Raises:** `ValueError` as `scan` does.
        """
        _check_tokens("hidden_states", tokens, 1)
        check_reset_and_length("LanguageModel", tokens.shape[0], reset, length)
        hidden = self.layers.hidden_states(self.embed(tokens), reset=reset, length=length)
        return jnp.concatenate([hidden, jax.vmap(self.norm_f)(hidden[-1])[None]])

    def embed(self, tokens: Integer[Array, "*seq"]) -> Float[Array, "*seq {self.d_model}"]:
        """Returns the residual stream before the first layer: the rows of the embedding, times
        `embedding_multiplier`.

        **Arguments:**

        - `tokens`: token ids, of any shape.
        """
        weight = self.embedding.weight
        dtype = at_least_float32(weight) if self.residual_in_fp32 else weight.dtype
        # JAX adds the number of rows to negative indices, which overflows in int16.
        x = _rows(weight, tokens.astype(jnp.int32)).astype(dtype)
        return scaled(x, self.embedding_multiplier)


def check_vocab_size(vocab_size: int, padded_vocab_size: int | None) -> int:
    """Validates the sizes of the vocabulary.

    **Returns:**

    `padded_vocab_size`, with its default `vocab_size` if it is `None`.
    """
    check_positive("vocab_size", vocab_size)
    padded_vocab_size = vocab_size if padded_vocab_size is None else padded_vocab_size
    check_positive("padded_vocab_size", padded_vocab_size)
    if padded_vocab_size < vocab_size:
        raise ValueError(
            "`padded_vocab_size` must be at least `vocab_size`, but got "
            f"padded_vocab_size={padded_vocab_size} and vocab_size={vocab_size}."
        )
    return padded_vocab_size


def _rows(
    weight: Float[Array, "vocab d_model"], tokens: Integer[Array, "*seq"]
) -> Float[Array, "*seq d_model"]:
    """Returns the rows of an embedding, sharded as the tokens are."""
    if not has_explicit_axes(tokens):
        return weight[tokens]
    # In a mesh with explicit axes, JAX does not derive the sharding of a gather.
    if tokens.ndim == 0:
        return _rows(weight, tokens[None])[0]
    sharding = jax.typeof(tokens).sharding
    sharding = NamedSharding(sharding.mesh, P(*sharding.spec, None))
    return weight.at[tokens].get(out_sharding=sharding)


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
            "Encode text with a tokenizer first."
        )
