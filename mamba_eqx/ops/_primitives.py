"""What the primitives of this folder have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ._native import is_for_this_process


def register(
    primitive: Primitive,
    call: Callable[..., Array],
    shape: Callable[..., ShapedArray],
    rules: tuple[Callable[..., Any], ...],
    kernel: Callable[[Sequence[Array]], Callable[..., Array] | None] | None = None,
) -> None:
    """Tells JAX how to run, differentiate and batch a primitive.

    **Arguments:**

    - `primitive`: the primitive.
    - `call`: calls the primitive.
    - `shape`: the shape of the result, as a function of the shapes of the arguments.
    - `rules`: the function on accelerators and that on a CPU, and the rules for derivatives,
        transposes and batches.
    - `kernel`: returns the native kernel that computes the function of given arguments on a CPU, or
        `None` if there is none for them. `None` for a primitive without kernels.
    """
    accelerator, cpu, jvp, transpose, batched = rules
    primitive.def_impl(call)
    primitive.def_abstract_eval(shape)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(accelerator, multiple_results=False))

    def on_cpu(context: Any, *args: Any, **parameters: Any) -> Any:
        may_use_kernel = kernel is not None and is_for_this_process(context)

        def run(*args: Array, **parameters: Any) -> Array:
            native = kernel(args) if kernel is not None and may_use_kernel else None
            return (native or cpu)(*args, **parameters)

        return mlir.lower_fun(run, multiple_results=False)(context, *args, **parameters)

    mlir.register_lowering(primitive, on_cpu, platform="cpu")
