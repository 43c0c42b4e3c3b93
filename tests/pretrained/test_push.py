"""`push_to_hub` to a local server that speaks the Hub's protocol, and loading from there."""

import json

import pytest

from mamba_eqx.pretrained import CheckpointError, from_pretrained, push_to_hub
from mamba_eqx.text import ByteTokenizer, SpecialIds
from tests.support.checkpoints import BOTH, assert_same, config, make
from tests.support.hub_server import Fault


MODEL, OTHER = make(BOTH["tied"]), make(BOTH["untied"])
NAME = "me/mine"

# A warning of the HTTP library about `huggingface_hub`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def push(hub):
    def call(model=MODEL, **options):
        return push_to_hub(model, NAME, endpoint=hub.endpoint, token="hf_good", **options)

    return call


@pytest.fixture
def load(hub, tmp_path):
    def call(**options):
        options = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "token": "hf_good"} | options
        return from_pretrained(NAME, **options)

    return call


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 1000])
def test_pushed_model_can_be_loaded(layout, max_shard_size, hub, push, load):
    url = push(layout=layout, max_shard_size=max_shard_size, private=True)
    repository = hub.repositories[NAME]
    assert url == f"{hub.endpoint}/{NAME}/commit/{repository.refs['main']}"
    assert repository.private
    assert len(repository.commits) == 2  # The initial one, and ours.
    files = repository.commits[repository.refs["main"]]
    assert f'mbx.from_pretrained("{NAME}")' in files["README.md"].decode()
    assert ("model.safetensors" in files) == (max_shard_size == "5GB")
    assert_same(load(), MODEL)
    # The storage server for large files does not receive the token.
    assert {r.headers.get("authorization") for r in hub.requests if r.server == "storage"} == {None}


def test_old_weights_are_replaced_in_one_commit(hub, push, load):
    old = {"README.md": b"mine", "tokenizer.json": b"{}", "pytorch_model.bin": b"old"}
    repository = hub.add(NAME, old)
    push(max_shard_size=1000)
    assert_same(load(), MODEL)
    push(OTHER, commit_message="Another")
    assert len(repository.commits) == 3
    files = repository.commits[repository.refs["main"]]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert files["README.md"] == b"mine"
    assert_same(load(), OTHER)
    (*_, commit) = hub.asked("POST /api/models/me/mine/commit/main")
    header = json.loads(commit.body.splitlines()[0])
    assert header["value"]["summary"] == "Another"


def test_tokenizer_is_pushed_in_the_same_commit(hub, push):
    old = {"tokenizer.json": b"{}", "merges.txt": b"old", "notes.txt": b"mine"}
    repository = hub.add(NAME, old)
    tokenizer = ByteTokenizer(ids=SpecialIds(eos=(0, 2)))
    push(tokenizer=tokenizer)
    assert len(repository.commits) == 2
    files = repository.commits[repository.refs["main"]]
    ours = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(files) == [*ours, "notes.txt", "tokenizer_config.json"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads(files[name])["eos_token_id"] == [0, 2]
    push()  # Without one, that of the repository stays.
    assert sorted(repository.commits[repository.refs["main"]]) == sorted(files)


def test_pushes_to_branches_and_pull_requests(hub, push, load):
    push()
    push(OTHER, revision="v2")
    assert_same(load(), MODEL)
    assert_same(load(revision="v2"), OTHER)
    result = push(OTHER, create_pr=True)
    assert result.pr_url == f"{hub.endpoint}/{NAME}/discussions/1"
    assert_same(load(), MODEL)


def test_model_that_cannot_be_saved_creates_nothing(hub, push):
    with pytest.raises(CheckpointError, match="cannot store MLPs"):
        push(make(config(d_intermediate=128)))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST /api/repos/create", status=403), "does not permit it"),
        (Fault("PUT /large/", times=99, status=503), "could not be written: .*status 503.*later.$"),
        (Fault("POST .*/objects/batch", times=99, status=500), "could not be written"),
        (Fault("POST .*/commit/", times=99, status=429), "too many requests.*higher limit.$"),
    ],
    ids=lambda value: value.pattern if isinstance(value, Fault) else None,
)
def test_failure_leaves_repository_unchanged(fault, message, hub, push, load):
    if "create" not in fault.pattern:
        push(OTHER)
    hub.faults.append(fault)
    with pytest.raises(CheckpointError, match=rf"'me/mine'.*{message}"):
        push()
    assert hub.repositories.get(NAME) is None or len(hub.repositories[NAME].commits) == 2
    if "create" not in fault.pattern:
        assert_same(load(), OTHER)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"token": "hf_bad"}, "the token is not valid"), ({"token": False}, "log in")],
)
def test_push_without_permission_raises(options, message, hub):
    with pytest.raises(CheckpointError, match=rf"'me/mine'.*{message}"):
        push_to_hub(MODEL, NAME, endpoint=hub.endpoint, **options)
    assert hub.repositories == {}


def test_offline_push_raises(push, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be written: unset `HF_HUB_OFFLINE`"):
        push()
