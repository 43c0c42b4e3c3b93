"""Mutations of JSON that leave it well-formed, or nearly."""

import contextlib
import copy
import json
import math
from random import Random


# Stands for the path of a folder that no reader may touch; see `write_mutant`.
OUTSIDE = "@OUTSIDE@"


class Raw(str):
    """JSON that is written as it is."""

    __slots__ = ()


class Pairs(list[list[object]]):
    """A JSON object as pairs of a name and a value, so that a name can occur twice."""

    __slots__ = ()


RAW = (  # noqa: SIM905  (The list would take forty lines.)
    "null true false 0 -0 -1 1 2 3 7 0.5 -2.5 1e999 -1e999 NaN Infinity 1e308 1e-400 1000000 "
    "1000000000 2147483647 2147483648 4294967296 4000000000 9223372036854775808 "
    "18446744073709551616 1e19 [] {} [[]] [0] [null] [-1,2] 00 1. .5 0x10 'a' undefined"
).split()
RAW += [
    "9" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "0," * 2000 + "0]",
    '{"__float__": "NaN"}',
    '{"__float__": 1}',
    '{"__float__": "Infinity"}',
    '"\\u0000"',
    '"\\ud800"',
    '"\\udc80"',
    '"\\u001b[2J"',
    '"x',
]
STRINGS = (
    "",
    "a",
    " ",
    "x" * 300,
    "x" * 100_000,
    "..",
    ".",
    "../outside/secret",
    f"{OUTSIDE}/secret",
    "/etc/passwd",
    "config.json",
    "a/b",
    "a\\b",
    "C:\\x",
    "file:///etc/passwd",
    "NaN",
    "Infinity",
    "true",
    "1",
    "float32",
    "é\u2028\u202e",
    "__class__",
)


def mutate_json(content: bytes, random: Random) -> bytes:
    """Returns a JSON text with one of its values, names or entries changed.

    A text that is not JSON, because of an earlier mutation, is returned unchanged.
    """
    try:
        tree = json.loads(content, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
        changed = mutate_tree(tree, random)
        return dump(changed).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return content


def mutate_tree(tree: object, random: Random) -> object:
    """Changes one place of a parsed JSON text, whose objects are `Pairs`."""
    places = [place for place in _places(tree) if isinstance(place[0], list)]
    if not places or random.random() < 0.02:
        return _value(tree, tree, random)
    parent, index = random.choice(places)
    is_pair = isinstance(parent, Pairs)
    action = random.choice(
        ("value", "value", "value", "everywhere", "delete", "duplicate", "rename", "swap")
    )
    if action == "everywhere":
        _replace_everywhere(tree, parent[index][1] if is_pair else parent[index], random)
    elif action == "value" or (action == "rename" and not is_pair):
        if is_pair:
            parent[index][1] = _value(parent[index][1], tree, random)
        else:
            parent[index] = _value(parent[index], tree, random)
    elif action == "delete":
        del parent[index]
    elif action == "duplicate":
        copied = list(parent[index]) if is_pair else parent[index]
        parent.insert(random.randint(0, len(parent)), copied)
    elif action == "rename":
        names = [pair[0] for pair in parent]
        parent[index][0] = random.choice([*names, *STRINGS, Raw('"\\ud800"'), Raw('"\\u0000"')])
    else:
        other = random.randrange(len(parent))
        if is_pair:
            first, second = parent[index], parent[other]
            first[1], second[1] = second[1], first[1]
        else:
            parent[index], parent[other] = parent[other], parent[index]
    return tree


def _replace_everywhere(tree: object, old: object, random: Random) -> None:
    """Replaces all values equal to one, so that they still agree, by another value."""
    new = _value(old, tree, random)
    for parent, index in _places(tree):
        if isinstance(parent, Pairs) and parent[index][1] == old:
            parent[index][1] = new
        elif not isinstance(parent, Pairs) and parent[index] == old:
            parent[index] = new


def _places(tree: object) -> list[tuple[list, int]]:
    """Returns every entry of every list and object."""
    found: list[tuple[list, int]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            found += [(node, i) for i in range(len(node))]
            todo += [pair[1] for pair in node] if isinstance(node, Pairs) else node
    return found


def _value(old: object, tree: object, random: Random) -> object:
    """Returns another value, often of the same type."""
    if random.random() < 0.4:
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return random.choice((old + 1, old - 1, -old, 2 * old, old * 10**6, old / 2, str(old)))
        if isinstance(old, float):
            whole = int(old) if math.isfinite(old) else 0
            return random.choice((-old, old * 1e6, old / 1e6, whole, old + 1))
        if isinstance(old, str):
            return random.choice((old + "x", old[:-1], old.upper(), old * 50, f"../{old}", [old]))
        if isinstance(old, list):
            return random.choice((type(old)(old[1:]), type(old)(old * 2), Pairs(), [], None))
    if random.random() < 0.15:
        places = _places(tree)
        if places:
            parent, index = random.choice(places)
            # A copy, because a tree that contained itself would have no end.
            with contextlib.suppress(RecursionError):
                return copy.deepcopy(
                    parent[index][1] if isinstance(parent, Pairs) else parent[index]
                )
    return Raw(random.choice(RAW)) if random.random() < 0.7 else random.choice(STRINGS)


def dump(tree: object) -> str:
    """Converts a tree to JSON."""
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{dump(name)}: {dump(value)}" for name, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    return json.dumps(tree)
