"""The training step: gradients, updates, and the complete state of a run."""

from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_positive
from ..layers import cast
from ._loss import LossAux, empty_carry, next_token_loss


@runtime_checkable
class Loss(Protocol):
    """A loss function, which returns the mean over a batch and a [`mamba_eqx.training.LossAux`][].

    To set options of [`mamba_eqx.training.next_token_loss`][], wrap it in a function with the
    arguments below.
    """

    def __call__(
        self, model: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray, /
    ) -> tuple[Float[Array, ""], LossAux]:
        """Computes the loss of a batch.

        **Arguments:**

        - `model`: the model, in the dtype to compute in. Gradients are with respect to it.
        - `batch`: the batch, or a group of its rows.
        - `carry`: the state of each row before the batch; `None` if none is carried.
        - `key`: a PRNG key, different for each step and each group.

        **Returns:**

        The loss, a scalar, and a [`mamba_eqx.training.LossAux`][].
        """
        ...


class TrainState(eqx.Module):
    """The complete state of a training run, an ordinary pytree.

    A run that resumes from this state continues exactly as if it had not been interrupted; see
    [`mamba_eqx.training.Checkpoints`][].
    """

    model: PyTree
    """The model that is optimised, in full precision."""

    opt_state: PyTree
    """The state of the optimiser."""

    carry: PyTree | None
    """The states of the layers after the last batch, with a first axis of rows; or `None`."""

    average: PyTree | None
    """The exponential moving average of the model, or `None`."""

    step: Int[Array, ""]
    """The number of completed steps, skipped ones included."""

    skipped: Int[Array, ""]
    """The number of steps skipped because the loss or the gradient was not finite."""

    key: PRNGKeyArray
    """The key for losses that draw random numbers: each step gets `fold_in(key, step)`."""


class TrainStep:
    r"""A compiled training step: `state, metrics = train_step(state, batch)`.

    - *Gradient accumulation*: the rows of a batch go through the model in groups, one after
      another, so that the memory for one group suffices. The result is the gradient of the whole
      batch: groups are weighted by the number of targets that count in them.
    - *Mixed precision*: the step runs a copy of the model in `compute_dtype`, made by
      [`mamba_eqx.cast`][], which keeps the recurrences in float32. Gradients, moments and updates
      have the dtype of the model.
    - *Truncated backpropagation through time*: with a `carry`, each row of a batch continues where
      the same row of the previous batch ended. Gradients stop at the start of the batch.
      `batch.reset` marks where a row starts something new instead.
    - *Moving average* of the parameters, starting from the initial parameters:
      $\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta$.
    - *Non-finite steps*: if the loss or the norm of the gradient is infinite or NaN, the model, the
      optimiser's state, the average and the carry keep their values, and the step counts as
      `skipped`.

    The step donates the state passed to it: do not use that state again.
    """

    def __init__(
        self,
        optimiser: optax.GradientTransformation,
        loss: Loss | None = None,
        *,
        accumulate: int = 1,
        compute_dtype: DTypeLike | None = None,
        average_decay: float | None = None,
    ):
        r"""**Arguments:**

        - `optimiser`: an optax optimiser, for instance [`mamba_eqx.training.recipe`][].
        - `loss`: a [`mamba_eqx.training.Loss`][], called as `loss(model, batch, carry, key)`. By
            default [`mamba_eqx.training.next_token_loss`][], which ignores the key.
        - `accumulate`: the number of groups that the rows of a batch are split into. It must divide
            the number of rows.
        - `compute_dtype`: the dtype to compute in, such as `jax.numpy.bfloat16`; by default the
            dtype of the model.
        - `average_decay`: $\beta$, within `0 <= beta < 1`; `None` for no average.

        **Raises:** `ValueError` for an argument out of range.
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
        """Returns the state before the first step, which contains a copy of the model.

        **Arguments:**

        - `model`: the model, in the dtype in which it is optimised, usually float32.
        - `rows`: the number of rows of a batch, if the states of the layers are carried from batch
            to batch; `None` starts every batch from the empty state.
        - `key`: the key for losses that draw random numbers.

        **Returns:**

        A [`mamba_eqx.training.TrainState`][].
        """
        copy = lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf
        model = jax.tree.map(copy, model)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
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

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        """Makes one training step.

        **Arguments:**

        - `state`: the result of `init` or of the previous step.
        - `batch`: a [`mamba_eqx.training.Batch`][], or whatever the loss takes. The first axis of
            each of its arrays is the rows.

        **Returns:**

        The new state, and the metrics, all scalars: `loss`, `gradient_norm` (before clipping),
        `weight` (the number of targets that counted) and `skipped` (the number of steps skipped so
        far). `learning_rate` is added if the optimiser's state contains it, as with
        [`mamba_eqx.training.recipe`][] and any optimiser made by `optax.inject_hyperparams`.

        **Raises:** `ValueError` if `accumulate` does not divide the number of rows of the batch.
        """
        rows = len(jax.tree.leaves(batch)[0])
        if rows % self.accumulate:
            raise ValueError(
                f"`accumulate` must divide the rows of a batch, but got accumulate="
                f"{self.accumulate} and {rows} rows."
            )
        return self._run(batch, state)

    def _computing(self, model: PyTree) -> PyTree:
        """Returns the model in the dtype to compute in."""
        return model if self.compute_dtype is None else cast(model, self.compute_dtype)

    def _step(self, batch: PyTree, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        params, static = eqx.partition(state.model, eqx.is_inexact_array)
        key = jr.fold_in(state.key, state.step)
        found = self._gradient(params, static, batch, state.carry, key)
        norm = optax.tree.norm(found.grads)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
            updates, opt_state = self.optimiser.update(found.grads, state.opt_state, params)
        model = eqx.combine(optax.apply_updates(params, updates), static)
        average = state.average
        if average is not None and self.average_decay is not None:
            new, old = eqx.filter((model, average), eqx.is_inexact_array)
            mixed = optax.incremental_update(new, old, 1 - self.average_decay)
            average = eqx.combine(mixed, model)
        finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
        model, opt_state, average, carry = _select(
            finite,
            (model, opt_state, average, None if state.carry is None else found.carry),
            (state.model, state.opt_state, state.average, state.carry),
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)
        new_state = TrainState(model, opt_state, carry, average, state.step + 1, skipped, state.key)
        metrics = {
            "loss": found.loss,
            "gradient_norm": norm,
            "weight": found.weight,
            "skipped": skipped,
        }
        rates = optax.tree.get_all_with_path(opt_state, "learning_rate", _is_hyperparameter)
        if len(rates) == 1:
            metrics["learning_rate"] = rates[0][1]
        return new_state, metrics

    def _gradient(
        self,
        params: PyTree,
        static: PyTree,
        batch: PyTree,
        carry: PyTree | None,
        key: PRNGKeyArray,
    ) -> "_Gradient":
        """Returns the loss and the gradient of the whole batch, accumulated over groups of rows."""

        def loss_of(
            params: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray
        ) -> tuple[Array, LossAux]:
            return self.loss(self._computing(eqx.combine(params, static)), batch, carry, key)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        if self.accumulate == 1:
            (loss, aux), grads = value_and_grad(params, batch, carry, key)
            return _Gradient(loss, grads, *aux)

        def split(leaf: Array) -> Array:
            return jnp.reshape(leaf, (self.accumulate, -1, *leaf.shape[1:]))

        def add(total: _Total, group: _Group) -> tuple[_Total, PyTree]:
            (loss, aux), grads = value_and_grad(params, *group)
            weight, carry = aux
            loss, grads = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), (loss, grads))
            return jax.tree.map(jnp.add, total, _Total(loss, grads, weight)), carry

        batch, carry = jax.tree.map(split, (batch, carry))
        groups = _Group(batch, carry, jr.split(key, self.accumulate))
        first = jax.tree.map(lambda leaf: leaf[0], groups)
        (loss, aux), _ = jax.eval_shape(value_and_grad, params, *first)
        zero = jax.tree.map(jnp.zeros_like, _Total(loss, params, aux[0]))
        total, carry = jax.lax.scan(add, zero, groups)
        weight = jnp.where(total.weight == 0, jnp.ones_like(total.weight), total.weight)
        loss, grads = jax.tree.map(
            lambda leaf: leaf / weight.astype(leaf.dtype), (total.loss, total.grads)
        )
        join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
        return _Gradient(loss, grads, total.weight, jax.tree.map(join, carry))


class _Gradient(NamedTuple):
    """The gradient of a loss over a batch, and the results of the loss."""

    loss: Float[Array, ""]
    grads: PyTree
    weight: Float[Array, ""] | Int[Array, ""]
    carry: PyTree | None


class _Group(NamedTuple):
    """The input of one group of rows."""

    batch: PyTree
    carry: PyTree | None
    key: PRNGKeyArray


class _Total(NamedTuple):
    """Sums over the groups so far."""

    loss: Float[Array, ""]
    """The sum of the losses times their weights."""

    grads: PyTree
    """The sum of the gradients times their weights."""

    weight: Float[Array, ""] | Int[Array, ""]


def _select(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Returns the arrays of `new` if the condition holds, and those of `old` otherwise."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, new, old) if eqx.is_array(new) else new, new, old
    )


def _next_token_loss(
    model: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray
) -> tuple[Float[Array, ""], LossAux]:
    return next_token_loss(model, batch, carry)


def _is_hyperparameter(path: KeyPath, _: object) -> bool:
    """Returns whether a leaf is in a state of `optax.inject_hyperparams`, rather than the moment of
    a parameter with the same name."""
    return any(getattr(key, "name", None) == "hyperparams" for key in path)
