"""Damaged and hostile variants of the files of a folder, each reproducible by its number.

A mutation knows the structure of a file by its name: the JSON of a config stays well-formed, the
checksums of an archive fit. Without this, nearly all mutants would fail in the first check.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from ._archives import (
    mutate_lines,
    mutate_npy,
    mutate_safetensors,
    mutate_torch,
    mutate_xz,
)
from ._bytes import mutate_bytes
from ._json import OUTSIDE, mutate_json
from ._text import mutate_template


Mutation = Callable[[bytes, Random], bytes]

# By the end of the name.
_STRUCTURED: dict[str, Mutation] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".bin": mutate_torch,
    ".jinja": mutate_template,
    ".npy": mutate_npy,
    ".xz": mutate_xz,
}
# What can stand in the place of a file.
NODES = ("missing", "folder", "pipe")
LINKS = (
    "link to outside",
    "link to itself",
    "link to nothing",
    "link to the folder",
    "link to /dev/zero",
    "link to another file",
)


@dataclass(frozen=True)
class Mutant:
    """The files of a folder after some mutations.

    - `files`: the content of each file, or the name of what stands in its place.
    - `history`: the mutations, for messages.
    """

    files: dict[str, bytes | str]
    history: list[str]


def make_mutant(
    seed: str, files: Mapping[str, bytes], targets: Sequence[str], nodes: Sequence[str]
) -> Mutant:
    """Returns the mutant of a seed.

    **Arguments:**

    - `seed`: any text; equal seeds give equal mutants.
    - `files`: the valid files.
    - `targets`: patterns of the names of the files to mutate.
    - `nodes`: those of `NODES` and `LINKS` that may take the place of a file.
    """
    random = Random(seed)
    names = sorted(name for name in files if any(fnmatch(name, target) for target in targets))
    found: dict[str, bytes | str] = dict(files)
    history: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(names)
        content = found[name]
        if isinstance(content, str):
            continue
        structured = next((m for end, m in _STRUCTURED.items() if name.endswith(end)), None)
        if nodes and random.random() < 0.04:
            found[name] = random.choice(nodes)
            history.append(f"{name}: {found[name]}")
        elif structured is not None and random.random() < 0.75:
            found[name] = structured(content, random)
            history.append(f"{name}: {structured.__name__}")
        elif random.random() < 0.03:
            found[name] = files[random.choice(sorted(files))]
            history.append(f"{name}: content of another file")
        else:
            found[name] = mutate_bytes(content, random)
            history.append(f"{name}: {mutate_bytes.__name__}")
    return Mutant(found, history)


def write_mutant(mutant: Mutant, folder: Path, outside: Path) -> None:
    """Writes the files of a mutant.

    **Arguments:**

    - `mutant`: the mutant.
    - `folder`: an empty folder.
    - `outside`: a folder that no reader may touch, to which paths and links of mutants lead.
    """
    placeholder, real = OUTSIDE.encode(), os.fsencode(outside)
    for name, content in mutant.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content.replace(placeholder, real))
        elif content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content != "missing":
            others = sorted(set(mutant.files) - {name})
            targets = {
                "link to outside": outside / "secret",
                "link to itself": path,
                "link to nothing": folder / "nothing",
                "link to the folder": folder,
                "link to /dev/zero": Path("/dev/zero"),
                "link to another file": folder / (others or [name])[0],
            }
            path.symlink_to(targets[content])
