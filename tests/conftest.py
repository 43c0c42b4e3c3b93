import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

from tests.support import hub_server
from tests.support.hub_server import Hub


# Every annotation of the package is checked at run time, shapes included, and no dtype is promoted
# by accident. (Before the first import of the package.)
jaxtyping.install_import_hook("mamba_eqx", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("base", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", settings.get_profile("base"), max_examples=10)
settings.register_profile(
    "ci", settings.get_profile("base"), max_examples=10, derandomize=True, print_blob=True
)
settings.register_profile("thorough", settings.get_profile("base"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Without the run-time type checks, which users do not have: for tests of our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# None of the million objects that JAX keeps is garbage; looking for it took a tenth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="leave out what passed in the last run")


# Compiling is half of the work, and takes half the time without XLA's fusion emitters.
FAST = "--xla_cpu_use_fusion_emitters=false"


def _xla_knows(flags: str) -> bool:
    """XLA ends the process at a flag that it does not know, and they come and go."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(command, env=env, capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """The processes that run the tests inherit XLA's flags; `XLA_FLAGS= pytest` compiles as users
    do. What one of them has compiled, the others need not, nor does the next run."""
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if not runs_tests and "XLA_FLAGS" not in os.environ and _xla_knows(FAST):
        os.environ["XLA_FLAGS"] = FAST
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """For what compiles much and runs little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go() -> Iterator[None]:
    """A compiled program has memory mappings of its own. Linux allows a process 65,530 of them, and
    where there are no more XLA crashes, as it did towards the end of all tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()


# What compiles much, and is about single features: left to CI, which runs everything.
SLOW_FILES = {
    "layers/test_bidirectional.py",
    "cli/test_checkpoints.py",
    "cli/test_text.py",
    "pretrained/test_files_of_others.py",
    "generation/test_options.py",
    "training/test_killed_training.py",
    "training/test_lora.py",
    "ops/test_mamba3.py",
    "pretrained/test_hybrid.py",
    "pretrained/test_mamba2.py",
    "generation/test_speculate.py",
    "generation/test_state_file.py",
    "generation/test_state_tuning.py",
    "training/test_fit.py",
    "training/test_step.py",
}


# What passed, for `--rest`.
PASSED = "mamba_eqx/passed"
passed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        passed.add(re.sub(r"@[^\]]*$", "", report.nodeid))  # xdist appends the group


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache = getattr(session.config, "cache", None)
    if cache is not None and not hasattr(session.config, "workerinput"):
        cache.set(PASSED, sorted(passed))


# First, so that marks are there when tests are chosen by them.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is held for one layer runs in one process, which then compiles it once."""
    from tests.support.registry import VARIANTS  # Not before the hook above.

    for item in items:
        callspec = getattr(item, "callspec", None)
        name = None if callspec is None else callspec.params.get("name")
        if item.path.name == "test_laws.py" and name is not None:
            item.add_marker(pytest.mark.xdist_group(str(name)))
            if name in VARIANTS:
                item.add_marker(pytest.mark.slow)
        if f"{item.path.parent.name}/{item.path.name}" in SLOW_FILES or item.name.startswith(
            "test_code_runs[docs/"
        ):
            item.add_marker(pytest.mark.slow)
    cache = getattr(config, "cache", None)
    if config.getoption("--rest") and cache is not None:
        done = set(cache.get(PASSED, []))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


# A Hub on this machine.


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, and nobody logged in; its patience takes no time."""
    from huggingface_hub import constants

    server.repositories.clear()
    server.large.clear()
    server.requests.clear()
    server.faults.clear()
    server.afterwards = lambda request: None
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    return server
