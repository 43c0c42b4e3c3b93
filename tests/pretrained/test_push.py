"""`push_to_hub` against a Hub on this machine, and back again."""

import json

import pytest

from mamba_eqx.pretrained import CheckpointError, from_pretrained, push_to_hub
from tests.support.checkpoints import BOTH, assert_same, config, make
from tests.support.hub_server import Fault


MODEL, OTHER = make(BOTH["tied"]), make(BOTH["untied"])
NAME = "me/mine"

# Of the HTTP library about `huggingface_hub`.
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
def test_there_and_back(layout, max_shard_size, hub, push, load):
    url = push(layout=layout, max_shard_size=max_shard_size, private=True)
    repository = hub.repositories[NAME]
    assert url == f"{hub.endpoint}/{NAME}/commit/{repository.refs['main']}"
    assert repository.private
    assert len(repository.commits) == 2  # Of the repository itself, and ours.
    files = repository.commits[repository.refs["main"]]
    assert f'mbx.from_pretrained("{NAME}")' in files["README.md"].decode()
    assert ("model.safetensors" in files) == (max_shard_size == "5GB")
    assert_same(load(), MODEL)
    # Whoever is asked to keep the large files is not shown the token.
    assert {r.headers.get("authorization") for r in hub.requests if r.server == "storage"} == {None}


def test_what_was_there_is_replaced_in_one_commit(hub, push, load):
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


def test_branches_and_pull_requests(hub, push, load):
    push()
    push(OTHER, revision="v2")
    assert_same(load(), MODEL)
    assert_same(load(revision="v2"), OTHER)
    result = push(OTHER, create_pr=True)
    assert result.pr_url == f"{hub.endpoint}/{NAME}/discussions/1"
    assert_same(load(), MODEL)


def test_a_model_that_cannot_be_saved_makes_nothing(hub, push):
    with pytest.raises(CheckpointError, match="layers have an MLP"):
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
def test_a_failure_leaves_the_repository_as_it_was(fault, message, hub, push, load):
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
def test_who_may_push(options, message, hub):
    with pytest.raises(CheckpointError, match=rf"'me/mine'.*{message}"):
        push_to_hub(MODEL, NAME, endpoint=hub.endpoint, **options)
    assert hub.repositories == {}


def test_offline(push, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be written: unset `HF_HUB_OFFLINE`"):
        push()
