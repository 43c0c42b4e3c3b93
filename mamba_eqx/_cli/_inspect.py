"""`mamba-eqx inspect`."""

import argparse
import json
import tempfile
from pathlib import Path

from ..pretrained import Description, describe, open_checkpoint
from ._terminal import Commands, add_source, hub_of, write


def add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what is in a checkpoint",
        description="Says what is in a checkpoint, after checking its config and the names, shapes "
        "and dtypes of all tensors. Their values are not read, nor downloaded if the repository "
        "has safetensors.",
    )
    add_source(inspect)
    inspect.add_argument("--json", action="store_true", help="as JSON, for programs")
    inspect.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as headers:
        hub, header_folder = hub_of(args), Path(headers)
        description = describe(open_checkpoint(args.source, hub, header_folder=header_folder))
    if args.json:
        write(json.dumps(description.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        lines = _lines(description)
        width = max(len(name) for name, _ in lines)
        write("".join(f"{name:{width}}  {text}\n" for name, text in lines))


def _lines(found: Description) -> list[tuple[str, str]]:
    config = found.config
    lines = [("checkpoint", found.where), ("layout", found.layout)]
    for count, block in found.blocks:
        sizes = ", ".join(f"{k}={v}" for k, v in block.items() if k != "kind")
        lines.append(("layers", f"{count} x {block['kind']} ({sizes})"))
    rows = config.padded_vocab_size
    padded = "" if rows == config.vocab_size else f", padded to {rows:,}"
    head = "the head is the embedding" if config.tie_embeddings else "the head is separate"
    lines.append(("vocabulary", f"{config.vocab_size:,}{padded}; {head}"))
    parts = ", ".join(f"{part} {count:,}" for part, count in found.parameters.items())
    lines.append(("parameters", f"{sum(found.parameters.values()):,} ({parts})"))
    lines.append(("dtypes", ", ".join(f"{k} {v:,}" for k, v in found.dtypes.items())))
    lines.append(("weights", f"{_size(found.weight_bytes)} in memory"))
    grows = found.state_bytes_per_token
    more = f" and {_size(grows)} for each token" if grows else ", however long it is"
    lines.append(("state", f"{_size(found.state_bytes)} for each sequence{more}"))
    return lines


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
