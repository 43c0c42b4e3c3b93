"""Context parallelism: one sequence whose pieces lie on different devices."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jaxtyping import Array, Bool, Integer, PyTree, Shaped

from ..ops import CONTEXT_AXIS, from_first_piece


def context_scan(
    scan: Callable[..., tuple[PyTree, PyTree]],
    x: Shaped[Array, "seq ..."],
    state: PyTree | None = None,
    *,
    mesh: Mesh | AbstractMesh,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
) -> tuple[PyTree, PyTree]:
    r"""Runs a sequence in pieces, each on its own device ("context parallelism").

    The pieces lie along the axis `context` of the mesh. Outputs, final state and gradients are
    those of `scan(x, state, reset=reset, length=length)`. Each device has the activations of its
    own piece only, so that the memory of a device falls as one over the number of devices.

    Devices exchange summaries of their pieces, whose size does not depend on the length: for a
    recurrence $h' = a h + b$, the decay $a$ and the state $b$ of the piece; for Mamba-3 also its
    angle, its last key and its last input; for a convolution its last inputs. Each device runs the
    recurrence of its piece twice, from zeros for the summary, and from the state before the piece.

    The name `context` has this meaning wherever layers run: inside a `jax.shard_map` of your own,
    they take what varies over an axis of this name for pieces of one sequence. Give an axis for
    rows another name.

    Other axes of the mesh are free: under `jax.vmap`, the rows of a batch may be sharded over them.

    **Arguments:**

    - `scan`: a method that runs a sequence: `layer.scan`, or `model.backbone` or `model.scan` of a
        [`mamba_eqx.LanguageModel`][]. All its layers must be among [`mamba_eqx.Mamba1`][],
        [`mamba_eqx.Mamba2`][], [`mamba_eqx.Mamba3`][] and [`mamba_eqx.CausalConv1d`][], or treat
        each token by itself.
    - `x`: the sequence, shape `(seq, ...)`. The size of the axis `context` must divide `seq`.
    - `state`: the state before the first token; the empty past if `None`.
    - `mesh`: a mesh with an axis `context`.
    - `reset`, `length`: see [`mamba_eqx.AbstractSequenceLayer.scan`][].

    **Returns:**

    The outputs, sharded along time as `x`, and the final state, which all devices have.

    **Raises:** `ValueError` if the mesh has no axis `context`, if it does not divide the sequence,
    if the sequence is empty,
    if a piece is shorter than a convolution, or if a layer such as [`mamba_eqx.Attention`][] cannot
    run in pieces.
    """
    if CONTEXT_AXIS not in mesh.shape:
        raise ValueError(
            f"`mesh` must have an axis {CONTEXT_AXIS!r}, but got the axes {tuple(mesh.shape)}. "
            "Name the axis along which sequences are cut so."
        )
    seq, devices = x.shape[0], mesh.shape[CONTEXT_AXIS]
    if seq == 0:
        raise ValueError("`x` must have at least one token, but got none. Call `scan` itself.")
    if seq % devices:
        raise ValueError(
            f"The size of the mesh axis {CONTEXT_AXIS!r} must divide the length of `x`, but got "
            f"{devices} devices and {seq} tokens. Append padding, and pass `length`."
        )
    if isinstance(length, int) and not 0 <= length <= seq:
        raise ValueError(f"`length` must be within 0..{seq}, but got length={length}.")
    if reset is not None and (reset.shape != (seq,) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"`reset` must be a bool array of shape ({seq},), one value per token, but got "
            f"{reset.dtype} of shape {reset.shape}."
        )
    arrays, static = eqx.partition(scan, eqx.is_array)
    length = None if length is None else jnp.asarray(length, jnp.int32)

    def run(
        arrays: PyTree, x: Array, state: PyTree, reset: Array | None, length: Array | None
    ) -> tuple[PyTree, PyTree]:
        if length is not None:
            before = lax.axis_index(CONTEXT_AXIS) * x.shape[0]
            length = jnp.clip(length - before, 0, x.shape[0])
        y, state = eqx.combine(arrays, static)(x, state, reset=reset, length=length)
        return y, from_first_piece(state)

    cut = P(CONTEXT_AXIS)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), cut, P(), cut, P()),
        out_specs=(cut, P()),
        axis_names={CONTEXT_AXIS},
    )(arrays, x, state, reset, length)
