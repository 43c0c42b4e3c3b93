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


# Annotations of the package are checked at run time, including shapes, and dtypes are not promoted
# implicitly. The hook must be installed before the first import of the package.
jaxtyping.install_import_hook("mamba_eqx", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("base", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", settings.get_profile("base"), max_examples=6)
settings.register_profile(
    "ci", settings.get_profile("base"), max_examples=4, derandomize=True, print_blob=True
)
settings.register_profile("thorough", settings.get_profile("base"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Switches the run-time type checks off, so that tests see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# JAX keeps a million objects, none of which is garbage; searching them took a tenth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rest", action="store_true", help="skip tests that passed in the last run")
    parser.addoption(
        "--mutants",
        help="the number of mutants of each kind in tests/fuzz, or a range such as 7:8",
    )


# Compilation is half of the work, and takes half the time without XLA's fusion emitters. XLA would
# also split every program into many parts to compile them in parallel, which costs small ones time.
FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def _xla_knows(flags: str) -> bool:
    """Returns whether the installed XLA accepts the flags; an unknown flag ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(command, env=env, capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Sets XLA's flags, and a compilation cache shared by all test processes and later runs.

    `XLA_FLAGS= pytest` compiles as users do.
    """
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if not runs_tests and "XLA_FLAGS" not in os.environ and _xla_knows(FAST):
        os.environ["XLA_FLAGS"] = FAST
    cache = getattr(config, "cache", None)
    if cache is not None:
        folder = str(cache.mkdir("xla"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # For child processes.
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """Switches most optimisations off, for tests that compile much and run little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs() -> Iterator[None]:
    """Drops compiled programs when they hold too many memory mappings.

    Linux allows a process 65,530 mappings. XLA crashes when there are no more, as it did towards
    the end of a full run.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()


# The tests that passed, for `--rest`.
PASSED = "mamba_eqx/passed"
passed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        passed.add(re.sub(r"@[^\]]*$", "", report.nodeid))  # xdist appends the group's name


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache = getattr(session.config, "cache", None)
    if cache is not None and not hasattr(session.config, "workerinput"):
        cache.set(PASSED, sorted(passed))


# Runs first, so that the marks exist when tests are selected by them.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the laws of the registry's variants slow. Runs the laws of a layer in one process, and
    the quick tests of any other file.

    One process traces and compiles what they share only once.
    """
    from tests.support.registry import VARIANTS  # After the import hook.

    for item in items:
        callspec = getattr(item, "callspec", None)
        name = None if callspec is None else callspec.params.get("name")
        if item.path.parent.name == "laws" and name is not None:
            item.add_marker(pytest.mark.xdist_group(str(name)))
            if name in VARIANTS:
                item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow") is None:  # Slow tests fill the processes at the end.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    cache = getattr(config, "cache", None)
    if config.getoption("--rest") and cache is not None:
        done = set(cache.get(PASSED, []))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


# --- A Hub on this machine ---


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub without a logged-in user; waiting between retries takes no time."""
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
