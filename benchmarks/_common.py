"""Shared by all benchmarks: options, timing, limits of the machine, models and tables."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax, stages
from jax.typing import DTypeLike
from jaxtyping import PyTree

import mamba_eqx as mbx


MIB = 1 << 20

Run = Callable[[], Any]
"""A call to be timed, which returns arrays of any library."""

Pair = tuple[Run, Run]
"""The forward pass alone, and the forward and backward pass."""

Competitors = dict[str, Run]


# The mixers of the models below, by name.
MIXERS = {config.kind: config for config in (mbx.Mamba1Config, mbx.Mamba2Config, mbx.Mamba3Config)}


def arguments(
    description: str | None, *, parent: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parses the options of a benchmark.

    **Arguments:**

    - `description`: the docstring of the script.
    - `parent`: a parser without help, with further options.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[] if parent is None else [parent],
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that the script runs"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure mamba_eqx only")
    return parser.parse_args()


# --- Timing ---


def compiled(
    function: Callable[..., PyTree], *args: PyTree
) -> tuple[Callable[[], PyTree], stages.Compiled]:
    """Compiles `function(*args)`.

    Arrays in `args` are inputs of the compiled function, so XLA cannot fold them as constants.

    **Returns:** a function without arguments that calls the compiled function, and the executable.
    """
    arrays, static = eqx.partition(args, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def run(leaves: list[jax.Array]) -> PyTree:
        return function(*eqx.combine(jax.tree.unflatten(structure, leaves), static))

    executable = jax.jit(run).lower(leaves).compile()
    return lambda: executable(leaves), executable


def temporary_mib(executable: stages.Compiled) -> float:
    """Returns the temporary memory of a compiled function in MiB."""
    analysis = executable.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / MIB


def medians(
    competitors: Competitors, *, repeats: int = 7, budget: float = 20.0, warm: bool = True
) -> dict[str, float]:
    """Returns the median seconds per call of each competitor.

    The competitors take turns, so that other load on the machine affects all of them alike.

    **Arguments:**

    - `competitors`: the calls by name.
    - `repeats`: the maximum number of measurements per competitor.
    - `budget`: the number of seconds after which a competitor is not called again.
    - `warm`: whether to call each competitor once before measuring.
    """
    if warm:
        for run in competitors.values():
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(repeats):
        for name, run in competitors.items():
            if sum(seconds[name]) < budget:
                time.sleep(0.02)  # The threads of the previous call go to sleep.
                seconds[name].append(once(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def beside(base: Run, runs: Competitors, *, repeats: int) -> dict[str, tuple[float, float]]:
    """Returns the median seconds of each run, and the median ratio of its time to that of `base`.

    `base` runs before and after each run, so that a slow minute of the machine cancels out.
    """
    for run in (base, *runs.values()):
        jax.block_until_ready(run())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        before = once(base)
        for name, run in runs.items():
            seconds, after = once(run), once(base)
            found[name].append((seconds, 2 * seconds / (before + after)))
            before = after
    return {
        name: (statistics.median(s for s, _ in pairs), statistics.median(r for _, r in pairs))
        for name, pairs in found.items()
    }


def once(run: Run) -> float:
    """Returns the seconds of one call, including the wait for its result."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


# --- The machine ---


def limits(*, quick: bool = False) -> tuple[float, float]:
    """Measures the machine through XLA.

    **Returns:** bytes per second read from memory, and float32 operations per second in a matrix
    product.
    """
    rows = 1 << (12 if quick else 15)
    big = jnp.ones((rows, 4096), jnp.float32)
    vector = jnp.ones(4096, jnp.float32)
    reads = {
        "sum of rows": compiled(lambda t: jnp.sum(t, axis=1), big)[0],
        "sum of columns": compiled(lambda t: jnp.sum(t, axis=0), big)[0],
        "matrix times vector": compiled(lambda t, v: t @ v, big, vector)[0],
    }
    read = min(medians(reads, repeats=7).values())
    return big.nbytes / read, product_limits(jnp.float32, quick=quick)["float32"]


def product_limits(*dtypes: DTypeLike, quick: bool = False) -> dict[str, float]:
    """Measures matrix products through XLA, in the forms that XLA's CPU backend runs fast.

    **Arguments:**

    - `dtypes`: the dtypes of the factors. Sums are float32, or int32 for integers.
    - `quick`: whether to multiply small matrices.

    **Returns:** the operations per second by the name of the dtype.
    """
    runs: Competitors = {}
    operations: dict[str, int] = {}
    for dtype in (jnp.dtype(dtype) for dtype in dtypes):
        sums = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32

        def multiply(t: jax.Array, sums: DTypeLike = sums) -> jax.Array:
            contract = (((1,), (1,)), ((), ()))
            return lax.dot_general(t, t, contract, preferred_element_type=sums)

        # Without instructions for it, a product in int8 of 2048 x 2048 takes a quarter of a minute.
        side = 256 if quick else 2048 if dtype == jnp.float32 else 1024
        operations[dtype.name] = 2 * side**3
        runs[dtype.name] = compiled(multiply, jnp.ones((side, side), dtype))[0]
    found = medians(runs, repeats=7, budget=2)
    return {name: operations[name] / seconds for name, seconds in found.items()}


def print_facts(title: str, *, quick: bool = False) -> tuple[float, float]:
    """Prints the heading of a report and returns the limits of the machine (see `limits`)."""
    packages = ("jax", "jaxlib", "equinox", "torch", "transformers", "mambapy", "llama_cpp_python")
    versions = ", ".join(f"{name} {v}" for name in packages if (v := _version(name)))
    read, product = limits(quick=quick)
    narrow = product_limits(jnp.bfloat16, jnp.int8, quick=quick)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"## {title}{' (quick: tiny sizes, numbers mean nothing)' if quick else ''}\n")
    print(f"{now}; mamba_eqx {mbx.__version__}, {versions}, Python {platform.python_version()}.\n")
    print(
        f"{jax.devices()[0].platform.upper()}: {cpu()}, {cores()} cores, load {load:.1f}. "
        f"Instructions: {', '.join(instructions()) or 'unknown'}. Measured limits: memory is read "
        f"at {read / 1e9:.1f} GB/s, products run at {product / 1e9:.0f} GFLOP/s in float32, "
        f"{narrow['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16 and {narrow['int8'] / 1e9:.0f} GOP/s "
        "in int8.\n",
        flush=True,
    )
    return read, product


# Linux's names, first those of x86-64, then those of Arm.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def instructions() -> list[str]:
    """Returns the names of the instruction sets for products that the processor has, as far as the
    operating system tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            found = set(value.split())
            return [name for name in _INSTRUCTIONS if name in found]
    return []


def cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def cpu() -> str:
    """Returns the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- Models ---


def model_130m(mixer: str, *, stacked: bool = False) -> mbx.LanguageModel:
    """Builds a model in the shape of mamba-130m, mamba2-130m etc. with random weights."""
    block = mbx.BlockConfig(MIXERS[mixer](d_model=768))
    padded = 50280 if mixer == "mamba1" else 50288
    config = mbx.LanguageModelConfig(50277, (block,) * 24, padded_vocab_size=padded)
    return config.build(stacked=stacked, key=jr.key(0))


def tiny_model(mixer: str, *, stacked: bool = False, remat: bool = False) -> mbx.LanguageModel:
    """Builds the model of `--quick`: `d_model` 64, 2 layers, bytes."""
    config = mbx.LanguageModelConfig(256, (mbx.BlockConfig(MIXERS[mixer](d_model=64)),) * 2)
    return config.build(stacked=stacked, remat=remat, key=jr.key(0))


def byte_model(*, stacked: bool = False) -> mbx.LanguageModel:
    """Builds a model in the shape of the bundled one: 1.5 million parameters."""
    block = mbx.BlockConfig(mbx.Mamba1Config(d_model=192, d_state=8))
    config = mbx.LanguageModelConfig(256, (block,) * 6)
    return config.build(stacked=stacked, key=jr.key(0))


def random_tokens(model: mbx.LanguageModel, *shape: int) -> jax.Array:
    """Returns random token ids below the vocabulary size."""
    return jr.randint(jr.key(1), shape, 0, model.vocab_size, jnp.int32)


# --- Tables ---


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a markdown table. `None` is shown as a dash, floats with three digits."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(shown, cells)) + " |\n"

    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(map(line, rows))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a markdown table. `None` is shown as a dash, floats with three digits."""
    print(table(header, rows), flush=True)


def shown(cell: object) -> str:
    """Returns the text of a cell: `None` is a dash, floats have three digits."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def print_verdict(what: str, value: float | None, wanted: float, *, at_most: bool = False) -> None:
    """Prints whether a measured value meets a requirement of the project."""
    if value is None:
        print(f"- {what}: not measured (wanted: {wanted:g})")
        return
    good = value <= wanted if at_most else value >= wanted
    relation = "at most" if at_most else "at least"
    verdict = "met" if good else "MISSED"
    print(f"- {what}: {shown(float(value))} (wanted: {relation} {wanted:g}): {verdict}", flush=True)
