"""Hubs that are hostile, broken or slow: nothing but `CheckpointError`, and nothing outside the
cache, whatever they answer."""

import contextlib
import gzip
import os
import random
import time

import pytest

from mamba_eqx.pretrained import (
    CheckpointError,
    Hub as Options,
    from_pretrained,
    open_source,
    save_pretrained,
)
from tests.support.checkpoints import assert_same
from tests.support.hostile_hub import CONFIG, FILES, MODEL, NAME, WEIGHTS
from tests.support.hub_server import Fault


REQUESTS = "mamba_eqx.pretrained._hub_requests."
ABSENT = {"X-Error-Code": "EntryNotFound"}

NO_NAMES = ["../../../../x", "../" * 9 + "a" * 40, ".", "..", "a/b", "a\\b", ".hidden", "x" * 300]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize(
    "name",
    [
        "../../../../x",
        "{root}/" + "b" * 64,
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*NO_NAMES[1:], "{root}/x"]),
    ],
)
def test_names_from_the_hub_stay_in_the_cache(header, name, hub, find, root):
    value = name.format(root=root)
    file = WEIGHTS if header == "X-Linked-Etag" else CONFIG
    quoted = value if header == "X-Repo-Commit" else f'"{value}"'
    hub.faults.append(Fault(f"/resolve/.*/{file}", 99, headers={header: quoted}))
    with pytest.raises(CheckpointError, match=f"'me/mine'.*{header}|'me/mine'.*ETag"):
        find(CONFIG, WEIGHTS)
    hub.faults.clear()
    assert find(CONFIG, WEIGHTS) == [FILES[CONFIG], FILES[WEIGHTS]]


def test_missing_headers_raise(hub, find):
    for header in ("ETag", "X-Repo-Commit"):
        hub.faults[:] = [Fault("HEAD .*config.json", headers={header: ""})]
        with pytest.raises(CheckpointError, match=f"no {header}, so it is not from a Hub"):
            find(CONFIG)


def test_another_commit_raises(hub, find):
    hub.faults.append(Fault("HEAD .*/model", headers={"X-Repo-Commit": "c" * 40}))
    with pytest.raises(CheckpointError, match="belongs to another commit, 'cccc"):
        find(CONFIG, WEIGHTS)


@pytest.mark.parametrize(
    "revision", ["../x", "/x", "a/../../../../../x", "a//b", "", "a\\b", "a\0"]
)
def test_revisions_stay_in_the_cache(revision, hub, find):
    with pytest.raises(ValueError, match=r"`revision` must be the name of a branch"):
        find(CONFIG, revision=revision)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["../x", "..", "/etc/passwd", "a/b", "a\0b", "a" * 300, ""])
def test_names_of_files_are_plain(name, find):
    with pytest.raises(CheckpointError, match="not the plain name of a file"):
        find(name)


# Passing failures.


def test_passing_absence_is_not_remembered(hub, find, root):
    commit = hub.repositories[NAME].refs["main"]
    headers = ABSENT | {"X-Repo-Commit": commit}
    hub.faults.append(Fault("HEAD .*/model", status=404, headers=headers))
    assert find(CONFIG, WEIGHTS) == [FILES[CONFIG]]
    # Other packages write such a note, too.
    note = root / "cache/models--me--mine/.no_exist" / commit / WEIGHTS
    assert note.is_file()
    assert find(CONFIG, WEIGHTS) == [FILES[CONFIG], FILES[WEIGHTS]]


def test_hub_that_has_answered_must_answer_to_the_end(hub, find):
    hub.faults.append(Fault("HEAD .*/model", 99, status=503, headers={"Retry-After": "0"}))
    with pytest.raises(CheckpointError, match="status 503"):
        find(CONFIG, WEIGHTS)


def test_cached_commit_without_network_says_so(hub, find, root):
    commit = hub.repositories[NAME].refs["main"]
    assert find(CONFIG) == [FILES[CONFIG]]
    away = {"endpoint": "http://127.0.0.1:9", "cache_dir": root / "cache"}
    for revision in (None, commit):
        with pytest.raises(
            CheckpointError, match=r"^The cached part of .* which cannot be reached"
        ):
            from_pretrained(NAME, revision=revision, **away)


def test_misspelt_folder_is_noticed_at_once(root, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    away = {"endpoint": "http://127.0.0.1:9", "cache_dir": root / "cache"}
    for name in ("my_modle", "runs/my_modle"):
        with pytest.raises(
            CheckpointError, match=r"could not be reached: .*no local folder of that"
        ):
            from_pretrained(name, **away)


# Sizes.


@pytest.mark.parametrize("size", ["99999999999999999999", str(2**62), str(2**41), "-1"])
@pytest.mark.parametrize("header", ["X-Linked-Size", "Content-Length"])
def test_absurd_sizes_raise(size, header, hub, find, root):
    file = WEIGHTS if header == "X-Linked-Size" else CONFIG
    (root / "headers").mkdir()
    for headers in (None, root / "headers"):
        hub.faults[:] = [Fault(f"HEAD .*{file}", 99, headers={header: size})]
        with pytest.raises(CheckpointError, match=r"'me/mine'"):
            find(CONFIG, WEIGHTS, headers=headers)


def test_too_large_for_the_disk_raises(hub, find):
    hub.faults.append(Fault("HEAD .*/model", 99, headers={"X-Linked-Size": str(2**40)}))
    with pytest.raises(CheckpointError, match=r"the disk with .* has room for .*`cache_dir`"):
        find(CONFIG, WEIGHTS)
    assert not hub.asked("GET .*/model")


def test_unknown_size_is_accepted(hub, find):
    hub.faults.append(Fault("HEAD .*/model", 99, headers={"X-Linked-Size": ""}))
    assert find(CONFIG, WEIGHTS) == [FILES[CONFIG], FILES[WEIGHTS]]


@pytest.mark.parametrize("announced", ["Content-Length", ""])
def test_content_longer_than_announced_is_not_read(announced, hub, find, root):
    hub.faults.append(
        Fault("GET /large/", 99, endless=True, headers={announced or "Content-Length": ""})
    )
    with pytest.raises(CheckpointError, match="longer than the Hub announced"):
        find(CONFIG, WEIGHTS)
    assert hub.sent < 2**26
    assert len([*(root / "cache").glob("models--*/blobs/*")]) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_headers_need_no_whole_file(compressed, hub, find, root):
    content = FILES[WEIGHTS] + bytes(2**18)
    hub.add(NAME, FILES | {WEIGHTS: content})
    (root / "headers").mkdir()
    fault = Fault("GET /large/", 99, whole=True, endless=True, headers={"Content-Length": ""})
    if compressed:
        body = gzip.compress(content + bytes(2**25), 1)
        fault = Fault("GET /large/", 99, whole=True, body=body)
        fault.headers["Content-Encoding"] = "gzip"
    hub.faults.append(fault)
    _, found = find(CONFIG, WEIGHTS, headers=root / "headers")
    assert found == content[: 2**17] + bytes(len(content) - 2**17)
    assert hub.sent < 2**26


def test_wrong_encoding_raises(hub, find):
    hub.faults.append(Fault("GET .*config.json", 99, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(CheckpointError, match="'me/mine'"):
        find(CONFIG)


# Times.


def test_slow_answers_are_given_up(hub, find, monkeypatch):
    monkeypatch.setattr(REQUESTS + "_ANSWER_TIME", 0.05)
    monkeypatch.setattr(REQUESTS + "_STALL_TIME", 0.05)
    hub.faults.append(Fault("HEAD", 99, pause=0.02))
    with pytest.raises(CheckpointError, match=r"no whole answer came within 0\.05 seconds"):
        find(CONFIG)
    monkeypatch.setattr(REQUESTS + "_ANSWER_TIME", 30)
    hub.faults[:] = [Fault("GET", 99, pause=0.02)]
    with pytest.raises(CheckpointError, match=r"less than 10 MB of 'config.json' arrived within"):
        find(CONFIG)


def test_waits_as_long_as_the_hub_asks_within_reason(hub, find, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.faults.append(Fault("HEAD", 2, status=429, headers={"Retry-After": "20"}))
    hub.faults.append(Fault("HEAD", 1, status=503, headers={"Retry-After": "9" * 9}))
    hub.faults.append(Fault("HEAD", 1, status=503, headers={"Retry-After": "9" * 5000}))
    assert find(CONFIG) == [FILES[CONFIG]]
    assert waits == [20, 20, 60, 8]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "to",
    [
        "file:///etc/passwd",
        *(pytest.param(to, marks=pytest.mark.slow) for to in ("{here}", "http://[", "//", "\xff")),
    ],
)
def test_redirects_that_lead_nowhere_raise(method, to, hub, find):
    location = to.format(here=f"{hub.endpoint}/me/mine/resolve/main/config.json")
    if method == "GET":
        location = to.format(here="?")
    hub.faults.append(
        Fault(f"{method} .*config.json", 99, status=302, headers={"Location": location})
    )
    with pytest.raises(CheckpointError, match="'me/mine'"):
        find(CONFIG)


# The disk.


def test_cache_that_is_a_file_raises(find, root):
    with pytest.raises(CheckpointError, match="'me/mine'"):
        find(CONFIG, cache_dir=root / "x")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "a b", "\ud800", "a/b/", "~/x", ""])
def test_impossible_names_raise(name, root):
    with pytest.raises((CheckpointError, FileNotFoundError, ValueError), match=r"a|name_or_path"):
        open_source(name, Options(cache_dir=root / "cache", local_files_only=True))


def test_links_into_the_cache_are_followed(hub, root):
    """Older versions of `huggingface_hub` made folders of such links, with `local_dir`."""
    hub.add(NAME, FILES)
    cache, folder = root / "cache", root / "folder"
    from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache)
    (snapshot,) = cache.glob("models--me--mine/snapshots/*")
    folder.mkdir()
    for path in snapshot.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    assert_same(from_pretrained(folder, cache_dir=cache), MODEL)
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        from_pretrained(folder, cache_dir=root / "another")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_pipes_and_folders_are_not_read(name, root):
    folder = root / "folder"
    save_pretrained(MODEL, folder)
    for make_it in (os.mkfifo, os.mkdir):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
        make_it(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: it is not a regular file"):
            from_pretrained(folder)


# Any headers.

VALUES = [
    *NO_NAMES,
    *(f'"{name}"' for name in NO_NAMES),
    *(
        "",
        "0",
        "-1",
        "9" * 30,
        "1e9",
        "W/",
        '"',
        "a" * 40,
        '"' + "b" * 64 + '"',
        "\xff",
        "bytes 0-1/x",
    ),
]
HEADERS = ["ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Content-Length"]
HEADERS += ["Content-Range", "Content-Encoding", "Location", "Retry-After", "X-Error-Code"]
HEADERS += ["X-Xet-Hash", "X-Xet-Refresh-Route", "Link", "Transfer-Encoding", "Content-Disposition"]


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 400), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_headers_give_the_file_or_one_kind_of_error(seeds, hub, find, root, monkeypatch):
    monkeypatch.setattr(REQUESTS + "_ANSWER_TIME", 1)
    monkeypatch.setattr(REQUESTS + "_STALL_TIME", 1)
    for seed in seeds:
        rng = random.Random(seed)
        changed = {rng.choice(HEADERS): rng.choice(VALUES) for _ in range(rng.randint(1, 3))}
        pattern = rng.choice(["HEAD", "GET", "/resolve/", "/large/", "config", "model"])
        status = rng.choice([None, None, 200, 206, 302, 404, 416, 500])
        hub.faults[:] = [Fault(pattern, rng.randint(1, 4), status=status, headers=changed)]
        with contextlib.suppress(CheckpointError):
            for found in find(CONFIG, WEIGHTS, force_download=rng.random() < 0.5):
                assert found in FILES.values(), (seed, changed)
