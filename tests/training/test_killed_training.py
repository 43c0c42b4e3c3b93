"""A training run that is killed at any moment and resumed ends like an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import killed_training
from tests.support.runs import checkpoints, content, leftovers


ROOT = Path(__file__).parents[2]
STEPS = killed_training.STEPS


def start(folder, *options):
    command = [sys.executable, "-m", "tests.support.killed_training", str(folder), *options]
    # Later processes reuse what earlier ones have compiled.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache)


def wait_until(process, condition):
    """Waits for a condition and returns whether the process is still running; fails if it takes too
    long."""
    limit = time.monotonic() + 120
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < limit
        time.sleep(0.002)
    return False


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_same_content(folder, reference):
    got, want = content(folder), content(reference)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] != want[name]] == []
    assert f"checkpoints/step-{STEPS:09}/state.safetensors" in want
    lines = [json.loads(line) for line in want["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "size" in line] == [10, 20, 30, 40, 50]


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(tmp_path):
    folder = tmp_path / "killed"
    # Kill it at a random moment after its first checkpoint.
    process = start(folder)
    assert wait_until(process, lambda: checkpoints(folder))
    time.sleep(random.uniform(0, 0.1))
    kill(process)
    # Kill it while it writes the next checkpoint.
    before = checkpoints(folder)
    known = set(leftovers(folder))
    process = start(folder, "slow")
    assert wait_until(process, lambda: set(leftovers(folder)) - known)
    kill(process)
    assert leftovers(folder)
    assert checkpoints(folder) == before
    assert start(folder).wait() == 0
    killed_training.main(str(tmp_path / "reference"))
    assert_same_content(folder, tmp_path / "reference")


@pytest.mark.slow
def test_run_killed_many_times_resumes_bit_for_bit(tmp_path):
    folder = tmp_path / "killed"
    ends = []
    for i in range(7):
        # The first kill is during the first checkpoint, so there is none to resume from.
        process = start(folder, *["slow"] * (i % 3 == 0))
        known = set(leftovers(folder))
        wait_until(process, lambda known=known: set(leftovers(folder)) - known)
        time.sleep(random.uniform(0, 0.1))
        kill(process)
        ends.append(checkpoints(folder)[-1:])
    assert ends[0] == []
    assert len({str(end) for end in ends}) > 2
    assert start(folder).wait() == 0
    killed_training.main(str(tmp_path / "reference"))
    assert_same_content(folder, tmp_path / "reference")
