"""`mamba-eqx completion` prints a script that completes commands, options and files."""

import shutil
import subprocess
import sys

import pytest

from tests.support.commands import call


ASK = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last}
_shtab_mamba_eqx
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("mamba-eqx tra", {"train"}),
        ("mamba-eqx convert --kee", {"--keep-adapter"}),
        ("mamba-eqx generate --dtype b", {"bfloat16"}),
        ("mamba-eqx chat --model fol", {"folder"}),
    ],
)
def test_bash_completes(words, wanted, tmp_path, capsys):
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("There is no bash.")
    assert call("completion", "bash") == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "folder").mkdir()
    ask = ASK.format(script=script, words=words, last=len(words.split()) - 1)
    found = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert wanted == {line.strip().rstrip("/") for line in found.stdout.splitlines()}


def test_completion_without_shtab_and_for_other_shells(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert call("completion", "bash") == 2
    assert "pip install 'mamba_eqx[completion]'" in capsys.readouterr().err
    assert call("completion", "zhs") == 2
    assert "SHELL must be one of bash, zsh, tcsh, but got zhs. Did you mean zsh?" in (
        capsys.readouterr().err
    )
