"""Every benchmark runs with tiny sizes. Nothing here measures time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs(script: str, pytestconfig: pytest.Config):
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--no-peers"]
    # Benchmarks measure compiled programs, but here their compilation may be shared between runs.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("xla_benchmarks"))
        if pytestconfig.cache is not None
        else "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## "), done.stdout
    assert "\n| " in done.stdout, "no table was printed"


def test_readme_lists_every_benchmark():
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert [script for script in SCRIPTS if f"python benchmarks/{script}.py" not in text] == []
