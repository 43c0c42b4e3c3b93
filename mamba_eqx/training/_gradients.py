"""The mean loss and gradient of a batch whose rows go through the model in groups."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._dtypes import at_least_float32
from ._loss import LossAux
from ._loss_scale import LossScale


_Loss = Callable[[PyTree, PyTree, PyTree | None, PRNGKeyArray], tuple[Array, LossAux]]


class Gradient(NamedTuple):
    """The gradient of a loss over a batch, and the results of the loss."""

    loss: Float[Array, ""]
    grads: PyTree
    weight: Float[Array, ""] | Int[Array, ""]
    carry: PyTree | None


class Groups(NamedTuple):
    """The input of a loss; if there are several groups of rows, with a first axis of groups."""

    batch: PyTree
    carry: PyTree | None
    key: PRNGKeyArray

    def split(self, number: int) -> "Groups":
        """Returns the rows in groups, each with a key of its own: group i has every `number`-th row
        from row i."""
        # If the rows are sharded, each device has the same number of rows in every group.
        cut = lambda leaf: jnp.reshape(leaf, (-1, number, *leaf.shape[1:])).swapaxes(0, 1)
        batch, carry = jax.tree.map(cut, (self.batch, self.carry))
        return Groups(batch, carry, jr.split(self.key, number))


class _Total(NamedTuple):
    """Sums over the groups so far."""

    loss: Float[Array, ""]
    """The sum of the losses times their weights."""

    grads: PyTree
    """The sum of the gradients times their weights; `None` if only the loss is computed."""

    weight: Float[Array, ""] | Int[Array, ""]

    def plus(self, loss: Array, grads: PyTree, weight: Array) -> "_Total":
        """Returns the sums with one more group."""
        loss, grads = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), (loss, grads))
        return jax.tree.map(jnp.add, self, _Total(loss, grads, weight))

    def mean(self) -> tuple[Array, PyTree]:
        """Returns the weighted means of the losses and of the gradients."""
        weight = jnp.where(self.weight == 0, jnp.ones_like(self.weight), self.weight)
        return jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), (self.loss, self.grads))


def mean_gradient(loss_of: _Loss, params: PyTree, inputs: Groups, groups: int) -> Gradient:
    """Computes the loss and the gradient of a batch, accumulated over groups of rows.

    **Arguments:**

    - `loss_of`: a function of the parameters, a batch, its carry and a key to the mean loss.
    - `params`: the parameters to differentiate with respect to.
    - `inputs`: the whole batch.
    - `groups`: the number of groups, which divides the number of rows.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if groups == 1:
        (loss, aux), grads = value_and_grad(params, *inputs)
        return Gradient(loss, grads, *aux)

    def add(total: _Total, group: Groups) -> tuple[_Total, PyTree]:
        (loss, aux), grads = value_and_grad(params, *group)
        return total.plus(loss, grads, aux.weight), aux.carry

    inputs = inputs.split(groups)
    loss, weight = _zeros(loss_of, params, inputs)
    zero = _Total(loss, jax.tree.map(jnp.zeros_like, params), weight)
    total, carry = jax.lax.scan(add, zero, inputs)
    loss, grads = total.mean()
    join = lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])
    return Gradient(loss, grads, total.weight, jax.tree.map(join, carry))


def mean_loss(loss_of: _Loss, params: PyTree, inputs: Groups, groups: int) -> Float[Array, ""]:
    """Computes the loss of a batch, accumulated over groups of rows.

    For the arguments see `mean_gradient`. The gradient of this function needs the memory for one
    group only, as that of `mean_gradient`.
    """
    if groups == 1:
        return loss_of(params, *inputs)[0]

    def add(total: _Total, group: Groups) -> tuple[_Total, None]:
        loss, aux = jax.checkpoint(loss_of)(params, *group)
        return total.plus(loss, None, aux.weight), None

    inputs = inputs.split(groups)
    loss, weight = _zeros(loss_of, params, inputs)
    return jax.lax.scan(add, _Total(loss, None, weight), inputs)[0].mean()[0]


def scaled_gradient(
    loss_of: _Loss, params: PyTree, inputs: Groups, groups: int, loss_scale: LossScale | None
) -> Gradient:
    """Computes the loss and the gradient of a batch as `mean_gradient` does.

    With a `loss_scale`, the loss is multiplied before it is differentiated, and the results are
    divided by the same factor.
    """
    if loss_scale is None:
        return mean_gradient(loss_of, params, inputs, groups)
    scale = loss_scale.scale

    def scaled(
        params: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray
    ) -> tuple[Array, LossAux]:
        loss, aux = loss_of(params, batch, carry, key)
        return loss.astype(at_least_float32(loss)) * scale, aux

    found = mean_gradient(scaled, params, inputs, groups)
    unscale = lambda leaf: leaf / scale.astype(leaf.dtype)
    loss, grads = jax.tree.map(unscale, (found.loss, found.grads))
    return found._replace(loss=loss, grads=grads)


def _zeros(loss_of: _Loss, params: PyTree, inputs: Groups) -> tuple[Array, Array]:
    """Returns zeros of the dtypes of the loss and of the weight of one group."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    loss, aux = jax.eval_shape(loss_of, params, *first)
    return jnp.zeros((), loss.dtype), jnp.zeros((), aux.weight.dtype)
