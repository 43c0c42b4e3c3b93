"""The files of a training run."""


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("step-*"))


def leftovers(folder):
    return list((folder / "checkpoints").glob(".*.tmp"))


def content(folder):
    """Returns the content of each file of a run, except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
