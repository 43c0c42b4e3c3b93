from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_positive
from ..layers import cast
from ._loss import LossAux, empty_carry, next_token_loss


class Loss(Protocol):
    """A loss: the mean over a batch, and what comes with it. To give options to
    [`mamba_eqx.training.next_token_loss`][] wrap it in a function; or write one of your own.
    """

    def __call__(
        self, model: Any, batch: Any, carry: PyTree | None, key: PRNGKeyArray, /
    ) -> tuple[Float[Array, ""], LossAux]: ...


class TrainState(eqx.Module):
    """All that a training consists of at one moment: a pytree, and a value like any other.

    What it holds is enough to go on exactly as if nothing had happened; see
    [`mamba_eqx.training.Checkpoints`][].
    """

    model: PyTree
    """The model that is optimised, in full precision."""

    opt_state: PyTree
    """The state of the optimiser."""

    carry: PyTree | None
    """The states of the layers after the last batch, one for each of its rows; or `None`."""

    average: PyTree | None
    """The exponential moving average of the model, or `None`."""

    step: Int[Array, ""]
    """How many batches were seen."""

    skipped: Int[Array, ""]
    """How many of them were skipped, because the loss or the gradient was not finite."""

    key: PRNGKeyArray
    """For losses that draw random numbers: each step gets `fold_in(key, step)`."""


class TrainStep:
    r"""One step of training, compiled: `state, metrics = train_step(state, batch)`.

    - *Gradient accumulation*: the rows of a batch go through the model in several groups, one
      after another, in the memory of one. The gradient is that of the whole batch: the groups are
      weighted by how many targets count in them.
    - *Mixed precision*: the model of the state stays as it is, and a copy in `compute_dtype` made
      by [`mamba_eqx.cast`][] is run (which leaves the recurrences in float32). Gradients, moments
      and updates have the dtype of the model.
    - *Truncated backpropagation through time*: with a `carry` each batch goes on where the one
      before it ended, row by row; gradients end at the beginning of the batch. Where a row begins
      something new, `batch.reset` says so.
    - *Moving average* of the parameters: $\bar\theta \leftarrow \beta \bar\theta + (1 - \beta)
      \theta$, from the initial ones.
    - *Steps that are not finite*: if the loss or the norm of the gradient is infinite or not a
      number, model, optimiser, average and carry stay what they were, and the step counts as
      `skipped`.

    The state given is used up: its memory holds the new one.
    """

    def __init__(
        self,
        optimiser: optax.GradientTransformation,
        loss: Callable[..., tuple[Float[Array, ""], LossAux]] | None = None,
        *,
        accumulate: int = 1,
        compute_dtype: DTypeLike | None = None,
        average_decay: float | None = None,
    ):
        r"""**Arguments:**

        - `optimiser`: from optax, for instance [`mamba_eqx.training.recipe`][].
        - `loss`: a [`mamba_eqx.training.Loss`][], called as `loss(model, batch, carry, key)`. By
            default [`mamba_eqx.training.next_token_loss`][], which needs no key.
        - `accumulate`: into how many groups the rows of a batch are split. It has to divide them.
        - `compute_dtype`: `jax.numpy.bfloat16`, say; by default that of the model.
        - `average_decay`: $\beta$, within `0 <= beta < 1`; `None` for no average.

        **Raises:** `ValueError` for a value out of range.
        """
        check_positive("accumulate", accumulate)
        if average_decay is not None and not 0 <= average_decay < 1:
            raise ValueError(
                f"`average_decay` must be within 0 <= average_decay < 1, but got {average_decay}."
            )
        self.optimiser = optimiser
        self.loss = _next_token_loss if loss is None else loss
        self.accumulate = accumulate
        self.compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        self.average_decay = average_decay
        self._run = eqx.filter_jit(self._step, donate="all-except-first")

    def init(self, model: PyTree, *, rows: int | None = None, key: PRNGKeyArray) -> TrainState:
        """The state before the first step. It holds a copy of the model.

        **Arguments:**

        - `model`: the model, in the precision in which it is optimised: float32 as a rule.
        - `rows`: of a batch, to carry the states of the layers from batch to batch. `None`: every
            batch starts from the empty past.
        - `key`: for losses that draw random numbers.
        """
        copy = lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf  # noqa: E731
        model = jax.tree.map(copy, model)
        with jax.numpy_dtype_promotion("standard"):  # optax's own code relies on it
            opt_state = self.optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        return TrainState(
            model=model,
            opt_state=opt_state,
            carry=None if rows is None else empty_carry(self._computing(model), rows),
            average=None if self.average_decay is None else jax.tree.map(copy, model),
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            key=jnp.copy(key),
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """**Arguments:**

        - `state`: from `init`, or the last step.
        - `batch`: a [`mamba_eqx.training.Batch`][], or whatever the loss takes; the first axis of
            each of its arrays are the rows.

        **Returns:**

        The new state, and the metrics: `loss`, `gradient_norm` (before it is clipped), `tokens`
        (how many targets counted) and `skipped` (steps so far); and `learning_rate`, if the state
        of the optimiser has one, as that of [`mamba_eqx.training.recipe`][] and of whatever
        `optax.inject_hyperparams` makes.

        **Raises:** `ValueError` if `accumulate` does not divide the rows of the batch.
        """
        rows = len(jax.tree.leaves(batch)[0])
        if rows % self.accumulate:
            raise ValueError(
                f"`accumulate` must divide the rows of a batch, but got accumulate="
                f"{self.accumulate} and {rows} rows."
            )
        return self._run(batch, state)

    def _computing(self, model: PyTree) -> PyTree:
        return model if self.compute_dtype is None else cast(model, self.compute_dtype)

    def _step(self, batch: Any, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        params, static = eqx.partition(state.model, eqx.is_inexact_array)
        key = jr.fold_in(state.key, state.step)
        loss, grads, count, carry = self._gradient(params, static, batch, state.carry, key)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # as above
            updates, opt_state = self.optimiser.update(grads, state.opt_state, params)
        model = eqx.combine(optax.apply_updates(params, updates), static)
        average = state.average
        if average is not None and self.average_decay is not None:
            new, old = eqx.filter((model, average), eqx.is_inexact_array)
            mixed = optax.incremental_update(new, old, 1 - self.average_decay)
            average = eqx.combine(mixed, model)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def if_finite(new: Any, old: Any) -> Any:
            return jnp.where(finite, new, old) if eqx.is_array(new) else new

        model, opt_state, average, carry = jax.tree.map(
            if_finite,
            (model, opt_state, average, None if state.carry is None else carry),
            (state.model, state.opt_state, state.average, state.carry),
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)
        new_state = TrainState(model, opt_state, carry, average, state.step + 1, skipped, state.key)
        metrics = {"loss": loss, "gradient_norm": norm, "tokens": count, "skipped": skipped}
        rates = optax.tree.get_all_with_path(opt_state, "learning_rate", _is_hyperparameter)
        if len(rates) == 1:
            metrics["learning_rate"] = rates[0][1]
        return new_state, metrics

    def _gradient(
        self, params: PyTree, static: PyTree, batch: Any, carry: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, PyTree, Array, PyTree]:
        """The loss, its gradient, its weight, and the new carry."""

        def loss_of(params: PyTree, batch: Any, carry: PyTree, key: Any) -> Any:
            return self.loss(self._computing(eqx.combine(params, static)), batch, carry, key)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        if self.accumulate == 1:
            (loss, (count, carry)), grads = value_and_grad(params, batch, carry, key)
            return loss, grads, count, carry

        def split(leaf: Array) -> Array:
            return jnp.reshape(leaf, (self.accumulate, -1, *leaf.shape[1:]))

        def group(total: Any, piece: Any) -> tuple[Any, PyTree]:
            batch, carry, key = piece
            (loss, (count, carry)), grads = value_and_grad(params, batch, carry, key)
            weighted = jax.tree.map(lambda leaf: leaf * count.astype(leaf.dtype), (loss, grads))
            return jax.tree.map(jnp.add, total, (*weighted, count)), carry

        groups = jax.tree.map(split, (batch, carry))
        first = jax.tree.map(lambda leaf: leaf[0], groups)
        shapes = jax.eval_shape(value_and_grad, params, *first, key)
        (loss_shape, (count_shape, _)), _ = shapes
        zero = jax.tree.map(jnp.zeros_like, (loss_shape, params, count_shape))
        keys = jr.split(key, self.accumulate)
        (loss, grads, count), carry = jax.lax.scan(group, zero, (*groups, keys))
        weight = jnp.where(count == 0, jnp.ones_like(count), count)
        loss, grads = jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), (loss, grads))
        join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        return loss, grads, count, jax.tree.map(join, carry)


def _next_token_loss(
    model: Any, batch: Any, carry: PyTree | None, key: PRNGKeyArray
) -> tuple[Array, LossAux]:
    return next_token_loss(model, batch, carry)


def _is_hyperparameter(path: tuple[Any, ...], _: Any) -> bool:
    """Whether it is in a state of `optax.inject_hyperparams`, and not in a model's moments."""
    return any(getattr(key, "name", None) == "hyperparams" for key in path)
