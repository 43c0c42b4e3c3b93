"""The folder in which compiled programs are kept between processes."""

import os
import sys
import warnings
from pathlib import Path

import jax


_SWITCH = "MAMBA_EQX_NO_COMPILATION_CACHE"
_MAX_BYTES = 2**30

# JAX's options. Values other than the defaults are the user's.
_ENABLED = "jax_enable_compilation_cache"
_FOLDER = "jax_compilation_cache_dir"
_SIZE, _NO_LIMIT = "jax_compilation_cache_max_size", -1
_SECONDS, _ONE_SECOND = "jax_persistent_cache_min_compile_time_secs", 1.0


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keeps compiled programs in a folder, so that later processes need not compile them again.

    This turns on JAX's persistent compilation cache for the process. Programs compiled before the
    call are not kept. The command line and the examples call this function; the library itself
    never does. What the user has set for JAX is respected: with `JAX_COMPILATION_CACHE_DIR` (or
    `jax.config.jax_compilation_cache_dir`) that folder is used, and
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` keeps its value. Otherwise programs of any size
    are kept, and the least recently used ones are deleted beyond 1 GiB, or beyond
    `JAX_COMPILATION_CACHE_MAX_SIZE` bytes.

    JAX runs what it finds in the folder. Do not share it with users whom you do not trust.

    **Arguments:**

    - `folder`: the folder, created if needed. It has no effect if JAX has a folder already, also
        from an earlier call, because a process has one cache. By default a folder `mamba_eqx/xla`
        in the user's cache folder: `~/Library/Caches` on macOS, `LOCALAPPDATA` on Windows, and
        otherwise `XDG_CACHE_HOME` or `~/.cache`.

    **Returns:**

    The folder that is used, which is the one that JAX has already, if any; or `None` without one:
    if the environment variable `MAMBA_EQX_NO_COMPILATION_CACHE` is set (to anything but 0), if
    JAX's `JAX_ENABLE_COMPILATION_CACHE` is false, or if the folder cannot be written. The last also
    gives a warning, and everything runs as without a cache.
    """
    switched_off = os.environ.get(_SWITCH, "") not in ("", "0")
    if switched_off or not getattr(jax.config, _ENABLED):
        return None
    chosen: str | None = getattr(jax.config, _FOLDER)
    if not chosen:
        try:
            path = _user_folder() if folder is None else Path(folder)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"{path} is not writable")
        except (OSError, RuntimeError) as error:  # Without a home folder, a RuntimeError.
            warnings.warn(
                f"Compiled programs are not kept, because their folder cannot be used ({error}). "
                f"Set JAX_COMPILATION_CACHE_DIR to another folder, or {_SWITCH}=1.",
                stacklevel=2,
            )
            return None
        chosen = str(path)
        jax.config.update(_FOLDER, chosen)
        if getattr(jax.config, _SIZE) == _NO_LIMIT:
            jax.config.update(_SIZE, _MAX_BYTES)
    if getattr(jax.config, _SECONDS) == _ONE_SECOND and _SECONDS.upper() not in os.environ:
        # On a CPU, few of the programs that together take seconds to compile take one each.
        jax.config.update(_SECONDS, 0.0)
    # A full disk, or another process that holds the lock: JAX would warn for every program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    return Path(chosen)


def _user_folder() -> Path:
    """Returns the folder for compiled programs in the user's cache folder."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The specification says that a relative path is to be ignored.
        base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "mamba_eqx" / "xla"
