"""`mamba-eqx serve` refuses what it cannot carry out, with one line."""

import socket

import pytest

from mamba_eqx import _cli


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "3"], "--slots must be a power of two, but got 3"),
        (["--host", "0.0.0.0"], "Set MAMBA_EQX_API_KEY, or leave --host out"),
        (["--model", "missing/"], "missing"),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.delenv("MAMBA_EQX_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _cli.main(["serve", "--no-compilation-cache", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_port_in_use_is_an_error(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert _cli.main(["serve", "--slots", "1", "--port", str(port)]) == 2
    assert "error" in capsys.readouterr().err


def test_port_must_be_a_number(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        _cli.main(["serve", "--port", "65536"])
    assert "--port must be an integer within 0..65535, but got 65536" in capsys.readouterr().err
