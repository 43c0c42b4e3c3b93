"""Measures opening and loading a checkpoint in mamba-130m's shape: time and peak memory.

    python benchmarks/load.py [--quick] [--no-peers]

Every load runs in a new process; the numbers are medians. The memory is the peak beyond the model
itself. `pytorch_model.bin`, which torch writes, is measured if torch is installed, and left out
with `--no-peers`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from _common import arguments, model_130m, print_facts, print_table, tiny_model

import mamba_eqx as mbx


def make(folder: Path, *, quick: bool, peers: bool) -> list[str]:
    """Writes checkpoints of one model, and returns the names of their folders.

    The `"bin"` checkpoint is written only with `peers` and if torch is installed.
    """
    model = tiny_model("mamba1") if quick else model_130m("mamba1")
    mbx.save_pretrained(model, folder / "safetensors", layout="state-spaces")
    if not peers:
        return ["safetensors"]
    try:
        import torch
    except ImportError:
        return ["safetensors"]
    named = mbx.state_dict(model, layout="state-spaces")
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in named.items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]  # Shared, as in official files.
    (folder / "bin").mkdir()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    text = (folder / "safetensors" / "config.json").read_text()
    (folder / "bin" / "config.json").write_text(text)
    return ["bin", "safetensors"]


def anonymous_memory() -> int:
    """Returns the memory of this process in bytes, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: run this benchmark on Linux.")


def child(folder: Path, dtype: str | None) -> dict[str, float]:
    """Measures this process.

    **Returns:** the seconds to open and to load, and the sizes of the model and of the peak beyond
    it in megabytes.
    """
    import jax

    from mamba_eqx.pretrained import Hub, open_checkpoint

    jax.block_until_ready(jax.numpy.zeros(4) + 1)
    mbx.from_pretrained(mbx.SHIPPED)  # Sets up everything that is set up only once.
    start = time.perf_counter()
    open_checkpoint(folder, Hub())
    seconds = {"open": time.perf_counter() - start}
    peak, done = anonymous_memory(), False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, anonymous_memory())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = mbx.from_pretrained(folder, dtype=dtype)
    jax.block_until_ready(model)
    seconds["load"] = time.perf_counter() - start
    done = True
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return seconds | {"model": size / 1e6, "beyond": (peak - anonymous_memory()) / 1e6}


def measure(folder: Path, dtype: str | None, repeats: int) -> dict[str, float]:
    """Returns the medians of `child` over several processes."""
    command = [sys.executable, __file__, "--child", str(folder), str(dtype)]
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    args = arguments(__doc__)
    print_facts("Loading a checkpoint", quick=args.quick)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind in make(folder, quick=args.quick, peers=not args.no_peers):
            size = max(file.stat().st_size for file in (folder / kind).iterdir()) / 1e6
            for dtype in (None, "bfloat16"):
                found = measure(folder / kind, dtype, 2 if args.quick else 7)
                rows.append(
                    [
                        f"{kind}, {size:.0f} MB",
                        dtype or "as stored",
                        f"{found['open']:.3f} s",
                        f"{found['load']:.2f} s",
                        f"{found['model']:.0f} MB",
                        f"{found['beyond']:.0f} MB",
                    ]
                )
    print_table(["file", "dtype", "open", "load", "model", "peak beyond it"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        dtype = None if sys.argv[3] == "None" else sys.argv[3]
        print(json.dumps(child(Path(sys.argv[2]), dtype)))
    else:
        main()
