"""`from_pretrained` with `huggingface_hub` over HTTP, from a local server in place of the Hub."""

import functools
import hashlib
import json
import os
import re
import tempfile
import traceback
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from mamba_eqx.pretrained import CheckpointError, from_pretrained, save_pretrained, state_dict
from tests.support import torch_files as tf
from tests.support.checkpoints import BOTH, assert_same, make
from tests.support.hub_server import Fault, Hub


NAME = "me/mine"


@pytest.fixture
def load(hub: Hub, tmp_path: Path):
    return functools.partial(
        from_pretrained, NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"
    )


MODEL, OTHER = make(BOTH["tied"]), make(BOTH["untied"])


@functools.cache
def files(name: str = "tied", **options) -> dict[str, bytes]:
    """Returns the files of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(make(BOTH[name]), folder, **options)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def torch_files() -> dict[str, bytes]:
    """Returns the same checkpoint in the form of the official repositories."""
    arrays = {k: np.asarray(v) for k, v in state_dict(MODEL, layout="state-spaces").items()}
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    config = files(layout="state-spaces")["config.json"]
    return {"pytorch_model.bin": tf.torch_bytes(arrays), "config.json": config}


def downloaded(hub: Hub, content: dict[str, bytes]) -> set[str]:
    """Returns the names of the files whose content was sent."""
    names = {hashlib.sha256(body).hexdigest(): name for name, body in content.items()}
    found = {request.path.split("/")[-1] for request in hub.asked("^GET ")}
    return {names.get(name, name) for name in found}


def cached(tmp_path: Path) -> list[str]:
    """Returns the names of the files in the cache that hold content."""
    return sorted(p.name for p in (tmp_path / "cache").glob("models--*/blobs/*"))


# Downloads.


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        (files(), "config.json|model.safetensors"),
        (torch_files() | files(), "config.json|model.safetensors"),
        (torch_files(), "config.json|pytorch_model.bin"),
        (torch_files() | files(max_shard_size=1000), "config.json|model[-.].*(safetensors|json)"),
    ],
    ids=["safetensors", "both", "bin", "shards"],
)
def test_only_necessary_files_are_downloaded_and_only_once(content, needed, hub, load):
    extras = dict.fromkeys(
        ["README.md", "consolidated.safetensors", "flax_model.msgpack", "onnx/model.bin"], b"x"
    )
    hub.add(NAME, content | extras)
    assert_same(load(), MODEL)
    assert downloaded(hub, content) == {name for name in content if re.fullmatch(needed, name)}

    hub.requests.clear()
    assert_same(load(), MODEL)
    # The only request asks whether the branch has moved.
    assert [(r.method, r.path) for r in hub.requests] == [
        ("HEAD", "/me/mine/resolve/main/config.json")
    ]


def test_cached_commit_needs_no_network(hub, load):
    commit = hub.add(NAME, files()).refs["main"]
    assert_same(load(revision=commit), MODEL)
    hub.requests.clear()
    assert_same(load(revision=commit), MODEL)
    assert hub.requests == []


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_loads_from_cache_when_offline(how, hub, load, monkeypatch):
    from huggingface_hub import constants

    hub.add(NAME, files())
    options = {}
    if how == "HF_HUB_OFFLINE":
        offline = functools.partial(monkeypatch.setattr, constants, "HF_HUB_OFFLINE")
    else:
        options["local_files_only"] = True
        offline = lambda on: None
    offline(True)
    with pytest.raises(CheckpointError, match=r"'me/mine'.*not in the local cache.*while online"):
        load(**options)
    offline(False)
    assert_same(load(), MODEL)
    hub.requests.clear()
    offline(True)
    assert_same(load(**options), MODEL)
    with pytest.raises(CheckpointError, match=r"at revision 'v2'.*not in the local cache"):
        load(revision="v2", **options)
    assert hub.requests == []


def test_offline_with_incomplete_cache_raises(hub, load):
    hub.add(NAME, {"config.json": files()["config.json"]})
    with pytest.raises(CheckpointError, match=r"'me/mine'.*has no weights: none of model.safet"):
        load()
    with pytest.raises(CheckpointError, match=r"^The cached part of the repository 'me/mine'"):
        load(local_files_only=True)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_revision_is_resolved_once(method, hub, load):
    """A push during a download, after the first or the second request, has no effect on it."""
    repository = hub.add(NAME, files())
    first = repository.refs["main"]
    config = files()["config.json"]
    pushed = files("untied") | {"config.json": config.replace(b'"silu"', b'"gelu"')}

    def push(request):
        # The content is requested from the commit that the first answer names.
        if re.fullmatch(f"{method} /me/mine/resolve/(main|{first})/config.json", request):
            repository.commit(pushed)

    hub.afterwards = push
    assert_same(load(), MODEL)
    hub.afterwards = lambda request: None
    assert repository.refs["main"] != first
    assert {r.path.split("/")[4] for r in hub.asked("/resolve/")} == {"main", first}
    with pytest.raises(CheckpointError, match="hidden_act"):
        load()
    assert_same(load(revision=first), MODEL)


def test_loads_branches_tags_and_pull_requests(hub, load):
    repository = hub.add(NAME, files())
    for name in ("v2", "refs/pr/4", "a/b#?c"):
        repository.commit(files("untied"), name)
        assert_same(load(revision=name), OTHER)
        assert_same(load(revision=name, local_files_only=True), OTHER)
    assert_same(load(), MODEL)
    with pytest.raises(CheckpointError, match=r"at revision 'v3'.*does not exist.*listed at http"):
        load(revision="v3")


def test_force_download_downloads_again(hub, load):
    hub.add(NAME, files())
    load()
    hub.requests.clear()
    assert_same(load(force_download=True), MODEL)
    assert len(hub.asked("^GET /large/")) == 1
    assert len(hub.asked("^GET /me/mine/resolve/[^/]*/config.json")) == 1
    with pytest.raises(ValueError, match="exclude each other"):
        load(force_download=True, local_files_only=True)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"'me/mine' on the Hugging Face Hub \(http.*\) is gated: accept its licence at http"),
        ({"token": "hf_good"}, "is gated: accept its licence at"),
        ({"token": "hf_bad"}, "the token is not valid.*401"),
    ],
)
def test_gated_repository_raises(options, message, hub, load, tmp_path):
    hub.add(NAME, files(), gated=True)
    with pytest.raises(CheckpointError, match=message) as error:
        load(**options)
    assert ("licence" in message) == (f"at {hub.endpoint}/me/mine," in str(error.value))
    assert cached(tmp_path) == []
    assert_same(load(token="hf_member"), MODEL)


@pytest.mark.parametrize("token", [None, "hf_good"])
def test_missing_repository_raises(token, hub, load):
    with pytest.raises(CheckpointError, match=r"'me/mine'.*does not exist, or is private.*log in"):
        load(token=token)


def test_private_repository_raises(hub, load):
    hub.add(NAME, files(), private=True)
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        load()
    assert_same(load(token="hf_good"), MODEL)


def test_missing_files_raise(hub, load):
    repository = hub.add(NAME, {"model.safetensors": b""})
    with pytest.raises(CheckpointError, match=r"'me/mine'.* has no config\.json"):
        load()
    shards = files(max_shard_size=1000)
    lost = next(name for name in shards if name.startswith("model-00002"))
    repository.commit({k: v for k, v in shards.items() if k != lost})
    with pytest.raises(CheckpointError, match=f"the file '{lost}' it refers to is missing"):
        load()


def test_index_cannot_lead_out_of_the_repository(hub, load):
    index = {"weight_map": {"x": "../../../../secret.safetensors"}}
    content = {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.add(NAME, {"config.json": files()["config.json"], **content})
    with pytest.raises(CheckpointError, match="not the plain name of a file"):
        load()
    assert not hub.asked("secret")


def test_invalid_name_raises(load):
    with pytest.raises(CheckpointError, match="neither a local folder nor a valid name"):
        from_pretrained("a--b/..c")


# Network failures.


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["HEAD .*main/config.json", "HEAD .*/model.safetensors"])
def test_requests_are_retried_when_the_hub_is_busy(path, status, hub, load):
    hub.add(NAME, files())
    hub.faults.append(Fault(path, times=2, status=status, headers={"Retry-After": "0"}))
    assert_same(load(), MODEL)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("HEAD .*main/config.json", 503, "answered with status 503"),
        ("HEAD .*/model.safetensors", 503, "answered with status 503.*`local_files_only=True`"),
        ("HEAD .*/model.safetensors", 429, r"too many requests \(429\)"),
        ("GET /large/", 429, r"too many requests \(429\)"),
        ("GET /large/", 503, "answered with status 503"),
        ("GET /large/", 403, r"does not permit it \(403\)"),
    ],
)
def test_persistent_failures_raise(path, status, message, hub, load, tmp_path):
    hub.add(NAME, torch_files() | files())
    hub.faults.append(Fault(path, times=99, status=status))
    with pytest.raises(CheckpointError, match=f"'me/mine'.*{message}"):
        load()
    # In particular, the weights in the other format are not loaded instead.
    assert not hub.asked("pytorch_model")
    assert len(cached(tmp_path)) <= 1
    hub.faults.clear()
    assert_same(load(), MODEL)


def test_unreachable_hub_raises(hub, tmp_path):
    hub.add(NAME, files())
    options = {"cache_dir": tmp_path / "cache", "endpoint": "http://127.0.0.1:9"}
    with pytest.raises(CheckpointError, match=r"127.0.0.1:9\) could not be read.*network"):
        from_pretrained(NAME, **options)
    assert_same(from_pretrained(NAME, **options | {"endpoint": hub.endpoint}), MODEL)
    # A cached model can be loaded without the Hub.
    assert_same(from_pretrained(NAME, **options), MODEL)


def test_interrupted_download_resumes(hub, load, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 100
    )  # It resumes from a multiple of this.
    hub.add(NAME, files())
    hub.faults.append(Fault("GET /large/", times=2, cut=500))
    assert_same(load(), MODEL)
    ranges = [r.headers.get("range") for r in hub.asked("GET /large/")]
    assert ranges == [None, "bytes=500-", "bytes=1000-"]


def test_download_that_is_always_interrupted_raises(hub, load, tmp_path):
    hub.add(NAME, files())
    hub.faults.append(Fault("GET /large/", times=99, cut=0))
    with pytest.raises(CheckpointError, match=r"'me/mine'.*could not be read"):
        load()
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize("symlinks", [True, False])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_content_of_the_right_size_raises(name, symlinks, hub, load, tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    if not symlinks:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
        monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    content = files()
    hub.add(NAME, content)
    wrong = bytearray(content[name])
    # Both are well formed, so that only the checksum can detect the change.
    at = wrong.index(b'"mamba"') if name == "config.json" else len(wrong) - 3
    wrong[at : at + 1] = b"'" if name == "config.json" else bytes([wrong[at] ^ 1])
    path = "GET /me/mine/resolve/.*json" if name == "config.json" else "GET /large/"
    hub.faults.append(Fault(path, times=2, body=bytes(wrong)))
    with pytest.raises(CheckpointError, match=f"'{name}' does not have the checksum.*removed"):
        load()
    hub.faults.clear()
    # The file does not stay in the cache, where it would be trusted.
    assert_same(load(), MODEL)


def test_content_of_the_wrong_size_raises(hub, load):
    hub.add(NAME, files())
    hub.faults.append(Fault("GET /large/", body=b"<html>Log in</html>"))
    with pytest.raises(CheckpointError, match=r"'me/mine'.*could not be read: .*should be of size"):
        load()
    assert_same(load(), MODEL)


def test_interrupt_during_verification_removes_the_file(hub, load, tmp_path, monkeypatch):
    hub.add(NAME, files())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert cached(tmp_path) == []
    assert_same(load(), MODEL)


def test_token_is_sent_to_the_hub_only(hub, load):
    hub.add(NAME, files(), private=True)
    load(token="hf_good")
    seen = {r.server: r.headers.get("authorization") for r in hub.requests}
    assert seen == {"hub": "Bearer hf_good", "storage": None}


@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
def test_token_that_a_hub_sends_back_is_not_shown(header, hub, load):
    """Tokens of other hubs do not begin with `hf_`."""
    token = "of-another-hub-123"
    hub.valid_tokens.add(token)
    hub.add(NAME, files())
    hub.faults.append(Fault("HEAD .*config.json", 99, headers={header: f'"/{token}"'}))
    with pytest.raises(CheckpointError, match=r"an identifier, but is .*/\*\*\*") as error:
        load(token=token)
    assert token not in "".join(traceback.format_exception(error.value))


def test_cache_may_be_in_any_folder(hub, tmp_path, monkeypatch):
    hub.add(NAME, files())
    monkeypatch.chdir(tmp_path)
    model = from_pretrained(NAME, endpoint=hub.endpoint, cache_dir="here")
    assert eqx.tree_equal(model, MODEL)
    # A snapshot in the cache can be loaded like any other folder.
    (snapshot,) = (tmp_path / "here").glob("models--me--mine/snapshots/*")
    assert eqx.tree_equal(from_pretrained(snapshot), MODEL)
    assert "model.safetensors" in os.listdir(snapshot)
