"""The optional package mamba-eqx-native, whose kernels are compiled C++."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from jax import export
from jaxtyping import Array

from .._explicit_axes import has_explicit_axes
from .._trees import varying_axes


NativeProduct = Callable[[Array, Array, Array], Array]


class NativeScan(NamedTuple):
    """The functions `selective_scan` and `selective_scan_reverse` of `mamba_eqx_native`."""

    forward: Callable[..., tuple[Array, ...]]
    reverse: Callable[..., tuple[Array, ...]]


class NativeGrouped(NamedTuple):
    """The functions `grouped_product` and `grouped_outer` of `mamba_eqx_native`."""

    product: Callable[..., Array]
    outer: Callable[..., Array]


_SWITCH = "MAMBA_EQX_NATIVE"


def native_product(*, required: bool = False) -> NativeProduct | None:
    """Returns `mamba_eqx_native.product`, or `None` if that package is missing or turned off.

    **Arguments:**

    - `required`: whether to raise an error rather than return `None`.

    **Raises:** `ImportError` if the package is required, but is not installed, cannot be used or is
    turned off; `ValueError` if the environment variable `MAMBA_EQX_NATIVE` is neither 0 nor 1.
    """
    module, reason = _found()
    if module is not None:
        return module.product
    if required:
        raise ImportError(reason)
    return None


def native_scan() -> NativeScan | None:
    """Returns the kernels of the selective scan, or `None` if the package is missing, turned off,
    or of a version that has none.

    **Raises:** `ValueError` if the environment variable `MAMBA_EQX_NATIVE` is neither 0 nor 1.
    """
    functions = _functions("selective_scan", "selective_scan_reverse")
    return None if functions is None else NativeScan(*functions)


def native_grouped() -> NativeGrouped | None:
    """Returns the kernels of products of groups of rows, or `None` if the package is missing,
    turned off, or of a version that has none.

    **Raises:** `ValueError` if the environment variable `MAMBA_EQX_NATIVE` is neither 0 nor 1.
    """
    functions = _functions("grouped_product", "grouped_outer")
    return None if functions is None else NativeGrouped(*functions)


def _functions(*names: str) -> list[Callable[..., Any]] | None:
    """Returns functions of the package, or `None` if it does not have all of them."""
    module, _ = _found()
    functions = [getattr(module, name, None) for name in names]
    return None if None in functions else functions  # pyright: ignore[reportReturnType]


def is_split(array: Array) -> bool:
    """Returns whether the type of an array tells how it is distributed over devices, which a call
    of a kernel does not carry over to its results."""
    return bool(varying_axes(array)) or has_explicit_axes(array)


def kernels_accept(arrays: Iterable[Array]) -> bool:
    """Returns whether kernels may compute with arrays while they are traced: not if an array is
    split, or has a symbolic size."""
    return not any(
        is_split(array) or any(map(export.is_symbolic_dim, array.shape)) for array in arrays
    )


def is_for_this_process(context: Any) -> bool:
    """Returns whether a program is compiled for a single device of this process, which its kernels
    need.

    `jax.export` refuses calls of kernels that are not part of JAX, and of several devices, each
    would compute what all of them should.

    **Arguments:**

    - `context`: that of a lowering rule.
    """
    module = context.module_context
    devices = getattr(module.axis_context, "num_devices", None)
    return devices == 1 and not module.lowering_parameters.for_export


@cache
def _found() -> tuple[ModuleType | None, str]:
    """Returns the package, or the reason why there is none."""
    wanted = os.environ.get(_SWITCH) or "1"
    if wanted not in ("0", "1"):
        raise ValueError(
            f"The environment variable {_SWITCH} must be 0 or 1, but is {wanted!r}. Unset it to "
            "use mamba-eqx-native if it is installed."
        )
    if wanted == "0":
        return None, (
            f"The environment variable {_SWITCH}=0 turns off the package mamba-eqx-native, which "
            '`implementation="native"` needs. Unset it before starting Python.'
        )
    if importlib.util.find_spec("mamba_eqx_native") is None:
        return None, (
            'The package mamba-eqx-native is not installed, which `implementation="native"` needs. '
            "Install it with `pip install --no-build-isolation --no-deps ./native` "
            "from a copy of the repository."
        )
    try:
        return importlib.import_module("mamba_eqx_native"), ""
    except ImportError as error:
        reason = f"The package mamba-eqx-native cannot be used. {error}"
        warnings.warn(f"{reason} Everything runs in JAX instead.", RuntimeWarning, stacklevel=2)
        return None, reason
