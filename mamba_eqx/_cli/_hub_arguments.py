"""Arguments that name a checkpoint and configure access to the Hub."""

import argparse
from pathlib import Path

from ..pretrained import Hub, may_be_there
from ._arguments import utf8_text


SOURCE_HELP = "checkpoint folder, or repository on the Hugging Face Hub"
_MAX_TOKEN = 4096  # bytes


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument for a checkpoint, and the options of `add_hub`."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    add_hub(parser)


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Adds the options for access to the Hub."""
    parser.add_argument(
        "--revision",
        metavar="REV",
        type=utf8_text,
        help="branch, tag or commit of the repository (default: its main branch)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=Path,
        help="folder for downloads (default: the cache of huggingface_hub)",
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--local-files-only", action="store_true", help="use cached files only, without a network"
    )
    network.add_argument(
        "--force-download", action="store_true", help="download again what is in the cache"
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with a token of the Hub (default: HF_TOKEN, or that of `hf auth login`)",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        type=utf8_text,
        help="address of the Hub (default: https://huggingface.co)",
    )


def check_folder(name: str, source: str | None) -> None:
    """Checks the argument `name`, before anything is downloaded or loaded, if it is the path of a
    folder. `None` is the default of an option.

    **Raises:** `ValueError` if there is nothing at the path.
    """
    if source is not None and not may_be_there(source):
        raise ValueError(
            f"{name} must name a folder or a repository on the Hub, but there is no folder "
            f"{source}."
        )


def hub_from_args(args: argparse.Namespace) -> Hub:
    """Returns the options for access to the Hub that the options of `add_hub` describe."""
    return Hub(
        revision=args.revision,
        token=_token(args.token_file),
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        force_download=args.force_download,
        endpoint=args.endpoint,
    )


def _token(path: Path | None) -> str | None:
    """Reads a token from a file. No option takes the token itself, because other users could read
    it in the list of processes. No message contains it either.

    **Raises:** `ValueError` if the file holds anything other than one word.
    """
    if path is None:
        return None
    with open(path, "rb") as file:
        token = file.read(_MAX_TOKEN).strip()
    if not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"--token-file must name a file with one token, but {path} has another content."
        )
    return token.decode("ascii")
