import ctypes
import importlib.machinery
import sys
from pathlib import Path

import jax


_TARGETS = (
    "mamba_eqx_native_grouped_outer",
    "mamba_eqx_native_grouped_product",
    "mamba_eqx_native_product",
    "mamba_eqx_native_selective_scan",
    "mamba_eqx_native_selective_scan_reverse",
)


def _load() -> ctypes.CDLL:
    """Loads the library and makes it known to XLA.

    **Raises:** `ImportError` if the library is missing, was built for another version of XLA, or
    has no kernels for the processor.
    """
    folder = Path(__file__).parent
    paths = [folder / f"_library{end}" for end in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    again = (
        "Build it for the installed jaxlib, from a copy of the repository: `pip install "
        "--no-build-isolation --force-reinstall --no-deps ./native` (this needs setuptools)."
    )
    if path is None:
        raise ImportError(f"{folder} does not contain the library. {again}")
    try:
        library = ctypes.CDLL(str(path))
        for target in _TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except Exception as error:
        # An `OSError` of the loader, or whatever XLA says of a library of another version.
        raise ImportError(f"{path} cannot be used with jaxlib: {error}. {again}") from error
    library.mamba_eqx_native_isa.restype = ctypes.c_char_p
    library.mamba_eqx_native_error.restype = ctypes.c_char_p
    reason = library.mamba_eqx_native_error()
    if reason is not None:
        raise ImportError(reason.decode())
    return library


if sys.byteorder != "little":
    raise ImportError("mamba-eqx-native supports little-endian processors only.")
_library = _load()


def isa() -> str:
    """Returns the name of the instructions in use: `"avx512"`, `"avx2"` or `"portable"`."""
    return _library.mamba_eqx_native_isa().decode()
