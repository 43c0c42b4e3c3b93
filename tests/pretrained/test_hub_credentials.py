"""Tokens, passwords and addresses of the Hub: validated, and shown nowhere."""

import base64
import logging
import traceback
from urllib.parse import quote

import pytest

from mamba_eqx.pretrained import CheckpointError, Hub as Options
from tests.support.hostile_hub import CONFIG, FILES, NAME
from tests.support.hub_server import Fault


def test_token_may_end_with_a_line(hub, find):
    hub.repositories[NAME].private = True
    assert find(CONFIG, token=" hf_good\n") == [FILES[CONFIG]]


@pytest.mark.parametrize("token", ["hf_secret\nx", "hf_sec ret", "hf_sécret", " \n", ""])
def test_invalid_token_raises_without_showing_it(token, hub, find):
    with pytest.raises(ValueError, match="`token` must be") as error:
        find(CONFIG, token=token)
    assert "secret" not in _printed(error.value)
    assert hub.requests == []


SECRET = "s3cr3t!" * 2


def test_secrets_are_not_shown(hub, find, caplog, monkeypatch):
    user = f"someone:{quote(SECRET)}@"
    endpoint = hub.endpoint.replace("//", f"//{user}")
    options = {"endpoint": endpoint, "token": "hf_" + "a1" * 17}
    shown = repr(Options(**options))
    password = "Basic " + base64.b64encode(f"someone:{SECRET}".encode()).decode()
    monkeypatch.setattr(hub, "valid_tokens", {password})
    faults = [
        Fault("HEAD", 99, status=503, headers={"Retry-After": "0"}),
        Fault("HEAD", 99, status=401),
        Fault("HEAD", 99, headers={"ETag": ""}),
        Fault("GET", 99, cut=0),
    ]
    with caplog.at_level(logging.DEBUG):
        assert find(CONFIG, endpoint=endpoint) == [FILES[CONFIG]]
        for fault in faults:
            hub.faults[:] = [fault]
            with pytest.raises(CheckpointError, match=f"{hub.endpoint}\\)") as error:
                find(CONFIG, **options, force_download=True)
            shown += _printed(error.value)
        hub.faults.clear()
        for wrong in (f"http://{user}127.0.0.1:9", f"ftp://{user}host"):
            with pytest.raises(ValueError, match=r"`endpoint`|could not be reached") as error:
                find(CONFIG, endpoint=wrong, force_download=True)
            shown += _printed(error.value)
    assert {request.headers.get("authorization") for request in hub.requests} == {password}
    shown += caplog.text
    for secret in (SECRET, quote(SECRET), password[6:], "a1a1"):
        assert secret not in shown


def _printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "endpoint", ["huggingface.co", "ftp://x", "http://", "http://[", "http://x:y", "http://a b", ""]
)
def test_invalid_endpoint_raises(endpoint, find):
    with pytest.raises(ValueError, match="`endpoint` must be the address of a Hub"):
        find(CONFIG, endpoint=endpoint)
