"""Measures start-up times: imports, and first tokens with cold and warm caches.

    python benchmarks/start.py [--quick]

Every measurement runs in a new process; the medians of several are printed. Other libraries are not
measured, except for the time to import those that mamba_eqx builds on.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial


def import_seconds(module: str) -> dict[str, float]:
    """Measures the import of a module."""
    start = time.perf_counter()
    __import__(module)
    return {"import": time.perf_counter() - start}


def token_seconds(which: str, stacked: bool) -> dict[str, float]:
    """Measures building a model and generating from a prompt of 16 tokens."""
    import jax
    import numpy as np
    from _common import byte_model, model_130m

    import mamba_eqx as mbx

    start = time.perf_counter()
    make = byte_model if which == "bytes" else partial(model_130m, "mamba1")
    model = make(stacked=stacked)
    jax.block_until_ready(jax.tree.leaves(model.embedding))
    seconds = {"build": time.perf_counter() - start}
    prompt = np.arange(16)
    for temperature in ("cold", "warm"):
        start = time.perf_counter()
        next(mbx.stream(model, prompt, 16))
        seconds[f"first token, {temperature}"] = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(mbx.generate(model, prompt, 16).tokens)  # `stream` has compiled the loop
    seconds["16 tokens, warm"] = time.perf_counter() - start
    return seconds


def command_seconds() -> dict[str, float]:
    """Measures `python -m mamba_eqx generate` with the bundled model."""
    command = [sys.executable, "-m", "mamba_eqx", "generate", "ROMEO:", "--json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"first token": json.loads(out.stdout)["seconds_to_first_token"]}


def child(task: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Runs a task in a new process and returns its measurements."""
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, __file__, "--child", *task],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    return json.loads(out.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


def medians_of(
    task: list[str], repeats: int, environment: dict[str, str] | None = None
) -> dict[str, float]:
    """Runs a task several times and returns the medians of its measurements."""
    runs = [child(task, environment) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    if "--child" in sys.argv:
        task = sys.argv[sys.argv.index("--child") + 1 :]
        if task[0] == "import":
            seconds = import_seconds(task[1])
        elif task[0] == "command":
            seconds = command_seconds()
        else:
            seconds = token_seconds(task[1], task[2] == "stacked")
        print(json.dumps(seconds))
        return

    from _common import arguments, print_facts, print_table

    args = arguments(__doc__)
    repeats = 1 if args.quick else 3
    print_facts("Start-up", quick=args.quick)
    rows = []
    for module in ("numpy", "jax", "equinox", "mamba_eqx"):
        seconds = medians_of(["import", module], repeats)
        rows.append((module, seconds["import"], seconds["process"]))
    print_table(("", "import, s", "whole process, s"), rows)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache, variables in (
            ("off", {"MAMBA_EQX_NO_COMPILATION_CACHE": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}),
            ("filled", {"JAX_COMPILATION_CACHE_DIR": folder}),
        ):
            if cache == "filled":
                child(["command"], variables)
            seconds = medians_of(["command"], repeats, variables)
            rows.append((cache, seconds["first token"]))
    print('Seconds to the first token of `python -m mamba_eqx generate "ROMEO:"`:\n')
    print_table(("compilation cache", "first token, s"), rows)

    columns = ["build", "first token, cold", "first token, warm", "16 tokens, warm", "process"]
    rows = []
    for which in ("bytes",) if args.quick else ("130m", "bytes"):
        for layers in ("stacked",) if args.quick else ("unrolled", "stacked"):
            task = ["tokens", which, layers]
            seconds = medians_of(task, repeats)
            rows.append((which, layers, "no", *(seconds[name] for name in columns)))
            with tempfile.TemporaryDirectory() as folder:
                cache = {
                    "JAX_COMPILATION_CACHE_DIR": folder,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                }
                child(task, cache)
                seconds = medians_of(task, repeats, cache)
            rows.append((which, layers, "filled", *(seconds[name] for name in columns)))
    print("Seconds to the first token (`stream`) and to 16 tokens (`generate`), 16-token prompt:\n")
    print_table(("model", "layers", "compilation cache", *columns), rows)


if __name__ == "__main__":
    main()
