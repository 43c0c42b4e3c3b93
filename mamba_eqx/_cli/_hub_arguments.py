"""Arguments that name a checkpoint and configure access to the Hub."""

import argparse
from pathlib import Path

from ..pretrained import Hub


SOURCE_HELP = "checkpoint folder, or repository on the Hugging Face Hub"


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument for a checkpoint, and the options of `add_hub`."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    add_hub(parser)


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Adds the options for access to the Hub."""
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of the repository (default: its main branch)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=Path,
        help="folder for downloads (default: the cache of huggingface_hub)",
    )
    parser.add_argument(
        "--local-files-only", action="store_true", help="use cached files only, without a network"
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="address of the Hub (default: https://huggingface.co)"
    )


def hub_from_args(args: argparse.Namespace) -> Hub:
    """Returns the options for access to the Hub that the options of `add_hub` describe."""
    # There is no option for the token, because other users could read it in the list of processes.
    # HF_TOKEN or a login provides the token.
    return Hub(
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        endpoint=args.endpoint,
    )
