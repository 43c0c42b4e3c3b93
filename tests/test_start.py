"""The import of the package, and the cache of compiled programs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import mamba_eqx as mbx
from mamba_eqx import _compilation_cache


ROOT = Path(__file__).parents[1]
OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


def option(name):
    return getattr(jax.config, name)


def run(*args, env=None, home):
    """Runs Python in a process whose cache folder is in `home`."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, *args],
        env=inherited
        | {"PYTHONPATH": str(ROOT), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        | {"LOCALAPPDATA": str(home / "cache")}
        | (env or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def programs(home):
    return sorted(path.name for path in home.rglob("*-cache"))


# --- The import ---


def test_import_leaves_out_what_layers_do_not_need(tmp_path):
    code = """
import sys, mamba_eqx
slow = {"optax", "huggingface_hub", "jinja2", "tokenizers", "safetensors", "tqdm", "matplotlib"}
parts = ("generation", "inspection", "pretrained", "testing", "text", "training")
slow |= {"hypothesis", *(f"mamba_eqx.{part}" for part in parts)}
print(sorted(slow & set(sys.modules)))
"""
    assert run("-c", code, home=tmp_path).stdout == "[]\n"


def test_types_and_run_time_agree_on_lazy_names(tmp_path):
    tree = ast.parse((ROOT / "mamba_eqx" / "__init__.py").read_text())
    typed = {
        alias.name
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "_typing.TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    code = """
import mamba_eqx
eager = set(vars(mamba_eqx))
names = {}
exec("from mamba_eqx import *", names)
assert set(names) - {"__builtins__"} <= set(dir(mamba_eqx))
print(*set(names) - eager - {"__builtins__"})
"""
    assert set(run("-c", code, home=tmp_path).stdout.split()) == typed | {"pretrained"}


def test_unknown_name_raises():
    with pytest.raises(AttributeError, match="'mamba_eqx' has no attribute 'Mamba4'"):
        mbx.Mamba4  # pyright: ignore[reportAttributeAccessIssue] # noqa: B018


# --- The cache of compiled programs ---


@pytest.fixture
def without_cache(monkeypatch):
    """JAX's defaults, which the test may change."""
    before = {name: option(name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (True, None, -1, 1.0), strict=True):
        monkeypatch.delenv(name.upper(), raising=False)
        jax.config.update(name, value)
    monkeypatch.delenv("MAMBA_EQX_NO_COMPILATION_CACHE", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "xdg"),
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache"),
        ("darwin", {"XDG_CACHE_HOME": "{home}/xdg"}, "Library/Caches"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "local"),
        ("win32", {"LOCALAPPDATA": ""}, "AppData/Local"),
    ],
)
def test_default_folder_is_the_platforms(
    platform, variables, folder, tmp_path, monkeypatch, without_cache
):
    monkeypatch.setattr(_compilation_cache.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    path = mbx.use_compilation_cache()
    assert path is not None
    assert path == tmp_path / folder / "mamba_eqx" / "xla"
    assert path.is_dir()
    assert option("jax_compilation_cache_dir") == str(path)
    assert option("jax_compilation_cache_max_size") == 2**30
    assert option("jax_persistent_cache_min_compile_time_secs") == 0
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o700


def test_users_settings_win(tmp_path, monkeypatch, without_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    before = [option(name) for name in OPTIONS]
    assert mbx.use_compilation_cache(tmp_path / "ours") == tmp_path / "theirs"
    assert [option(name) for name in OPTIONS] == before
    assert not (tmp_path / "ours").exists()


def test_first_folder_stays(tmp_path, without_cache):
    assert mbx.use_compilation_cache(tmp_path / "first") == tmp_path / "first"
    assert mbx.use_compilation_cache(tmp_path / "second") == tmp_path / "first"
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "switch", ["MAMBA_EQX_NO_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE"]
)
def test_cache_can_be_switched_off(switch, tmp_path, monkeypatch, without_cache):
    if switch.startswith("JAX"):
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        monkeypatch.setenv(switch, "1")
    assert mbx.use_compilation_cache(tmp_path / "ours") is None
    assert option("jax_compilation_cache_dir") is None
    monkeypatch.setenv(switch, "0")
    if not switch.startswith("JAX"):
        assert mbx.use_compilation_cache(tmp_path / "ours") == tmp_path / "ours"


def test_unusable_folder_is_one_warning(tmp_path, without_cache):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Compiled programs are not kept") as caught:
        assert mbx.use_compilation_cache(tmp_path / "file" / "below") is None
    assert len(caught) == 1
    assert option("jax_compilation_cache_dir") is None


@pytest.mark.slow
def test_command_keeps_programs(tmp_path):
    command = ("-m", "mamba_eqx", "generate", "ROMEO:", "--max-new-tokens", "4")
    off = run(*command, "--no-compilation-cache", home=tmp_path)
    assert programs(tmp_path) == []
    first = run(*command, home=tmp_path)
    kept = programs(tmp_path)
    assert any("decode" in name or "run" in name for name in kept), kept
    second = run(*command, home=tmp_path)
    assert programs(tmp_path) == kept  # A program that was compiled again would be a new file.
    assert off.stdout == first.stdout == second.stdout


def test_command_runs_without_a_writable_folder(tmp_path):
    (tmp_path / "cache").touch()
    done = run("-m", "mamba_eqx", "generate", "A", "--max-new-tokens", "1", home=tmp_path)
    warning, report = done.stderr.splitlines()
    assert warning.startswith("mamba-eqx: warning: Compiled programs are not kept")
    assert report.startswith("1 tokens, ")
