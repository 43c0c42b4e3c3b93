"""The files of a training run."""

import json
import shutil


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("step-*"))


def leftovers(folder):
    return list((folder / "checkpoints").glob(".*.tmp"))


def content(folder):
    """Returns the content of each file of a run, except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Values that take the place of others in JSON.
VALUES = [None, True, -1, 0, 2, 1e300, 10**30, "", "x", [], [1], {}, {"a": 1}]


def mutate(path, rng):
    """Damages a file, or a file in a folder, at random: its bytes, its JSON, or its kind."""
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    target = inside[rng.integers(len(inside))] if inside and rng.random() < 0.95 else path
    if not target.is_file():
        shutil.rmtree(target)
        target.write_bytes(bytes(rng.integers(0, 256, 5).tolist()))
        return
    data = bytearray(target.read_bytes())
    choice = rng.integers(7)
    at = int(rng.integers(max(len(data), 1)))
    if choice == 0:
        data[at : at + int(rng.integers(1, 9))] = bytes(rng.integers(0, 256, 3).tolist())
    elif choice == 1:
        data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(8)))]) if data else b"x"
    elif choice == 2:
        del data[at:]
    elif choice == 3:
        data[at:] = bytes(len(data) - at)
    elif choice == 4 and target.suffix == ".json":
        data = bytearray(_mutated_json(bytes(data), rng))
    elif choice == 5 and target != path:
        target.unlink()
        return
    elif choice == 6 and rng.random() < 0.3:
        target.unlink()
        target.mkdir()
        return
    target.write_bytes(data)


def _mutated_json(text, rng):
    try:
        values = json.loads(text)
    except ValueError:
        return text
    node = values
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[int(rng.integers(len(keys)))]
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            node = inner
            continue
        if isinstance(node, dict) and rng.random() < 0.3:
            del node[key]
        else:
            node[key] = VALUES[int(rng.integers(len(VALUES)))]
        break
    return json.dumps(values).encode()
