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
from jax import stages
from jaxtyping import PyTree

import mamba_eqx as mbx


MIB = 1 << 20

Run = Callable[[], Any]
"""A call to be timed, which returns arrays of any library."""

Pair = tuple[Run, Run]
"""The forward pass alone, and the forward and backward pass."""

Competitors = dict[str, Run]


# The choices of `--mixer`.
MIXERS = {config.kind: config for config in (mbx.Mamba1Config, mbx.Mamba2Config, mbx.Mamba3Config)}


def arguments(
    description: str | None, *, mixers: bool = False, tokens: list[int] | None = None
) -> argparse.Namespace:
    """Parses the options of a benchmark.

    **Arguments:**

    - `description`: the docstring of the script.
    - `mixers`: whether to add `--mixer`.
    - `tokens`: the default of `--tokens`; `None` leaves that option out.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that the script runs"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure mamba_eqx only")
    if mixers:
        parser.add_argument("--mixer", choices=MIXERS, default="mamba1", help="mixer of all layers")
    if tokens is not None:
        parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="prompt lengths")
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
    side = 1024 if quick else 2048
    square = jnp.ones((side, side), jnp.float32)
    vector = jnp.ones(4096, jnp.float32)
    reads = {
        "sum of rows": compiled(lambda t: jnp.sum(t, axis=1), big)[0],
        "sum of columns": compiled(lambda t: jnp.sum(t, axis=0), big)[0],
        "matrix times vector": compiled(lambda t, v: t @ v, big, vector)[0],
    }
    read = min(medians(reads, repeats=7).values())
    product = medians({"": compiled(lambda t: t @ t, square)[0]}, repeats=7)[""]
    return big.nbytes / read, 2 * side**3 / product


def print_facts(title: str, *, quick: bool = False) -> tuple[float, float]:
    """Prints the heading of a report and returns the limits of the machine (see `limits`)."""
    packages = ("jax", "jaxlib", "equinox", "torch", "transformers", "mambapy", "llama_cpp_python")
    versions = ", ".join(f"{name} {v}" for name in packages if (v := _version(name)))
    read, product = limits(quick=quick)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"## {title}{' (quick: tiny sizes, numbers mean nothing)' if quick else ''}\n")
    print(f"{now}; mamba_eqx {mbx.__version__}, {versions}, Python {platform.python_version()}.\n")
    print(
        f"{jax.devices()[0].platform.upper()}: {_cpu()}, {cores()} cores, load {load:.1f}. "
        f"Measured limits: memory is read at {read / 1e9:.1f} GB/s, float32 products run at "
        f"{product / 1e9:.0f} GFLOP/s.\n",
        flush=True,
    )
    return read, product


def cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cpu() -> str:
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


def small_model(mixer: str, *, stacked: bool = False, remat: bool = False) -> mbx.LanguageModel:
    """Builds the model of the training benchmarks: `d_model` 256, 8 layers, bytes."""
    block = mbx.BlockConfig(MIXERS[mixer](d_model=256))
    config = mbx.LanguageModelConfig(256, (block,) * 8)
    return config.build(stacked=stacked, remat=remat, key=jr.key(0))


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


def parameter_bytes(model: mbx.LanguageModel) -> int:
    """Returns the size of all weights in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))


# --- Tables ---


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a markdown table. `None` is shown as a dash, floats with three digits."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(_shown(cell) for cell in cells) + " |"

    print(line(header))
    print("|" + "---|" * len(header))
    for row in rows:
        print(line(row))
    print(flush=True)


def _shown(cell: object) -> str:
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
    print(
        f"- {what}: {_shown(float(value))} (wanted: {relation} {wanted:g}): {verdict}", flush=True
    )
