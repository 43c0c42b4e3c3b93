"""Runs the tests of this folder, which need eight devices, on simulated ones, in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_on_eight_devices():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "", str(folder)]
    command += ["--deselect", __file__, "-k", "not test_on_eight_devices"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        command, env=environment, cwd=folder.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
