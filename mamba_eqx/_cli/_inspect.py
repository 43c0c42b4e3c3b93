"""`mamba-eqx inspect`."""

import argparse
import json
import tempfile
from pathlib import Path

from ..pretrained import Description, describe, open_checkpoint
from ._hub_arguments import add_source, hub_from_args
from ._terminal import Commands, write


def add_inspect(commands: Commands) -> None:
    """Adds the `inspect` command."""
    inspect = commands.add_parser(
        "inspect",
        help="describe a checkpoint",
        description="Describe a checkpoint, after checking its config and the names, shapes and "
        "dtypes of all tensors. Tensor values are not read, and not downloaded if the repository "
        "has safetensors files.",
    )
    add_source(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as headers:
        hub, header_folder = hub_from_args(args), Path(headers)
        description = describe(open_checkpoint(args.source, hub, header_folder=header_folder))
    if args.json:
        write(json.dumps(description.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        lines = _lines(description)
        width = max(len(name) for name, _ in lines)
        write("".join(f"{name:{width}}  {text}\n" for name, text in lines))


def _lines(found: Description) -> list[tuple[str, str]]:
    """Returns the name and the text of each line to print."""
    config = found.config
    lines = [("checkpoint", found.where), ("layout", found.layout)]
    for count, block in found.blocks:
        lines.append(("layers", f"{count} x {_text(block)}"))
    rows = config.padded_vocab_size
    padded = "" if rows == config.vocab_size else f", padded to {rows:,}"
    head = "head tied to the embedding" if config.tie_embeddings else "separate head"
    lines.append(("vocabulary", f"{config.vocab_size:,}{padded}; {head}"))
    parts = ", ".join(f"{part} {count:,}" for part, count in found.parameters.items())
    total = sum(found.parameters.values())
    lines.append(("parameters", f"{total:,} ({parts})"))
    if found.active_parameters < total:
        lines.append(("active", f"{found.active_parameters:,} parameters for each token"))
    lines.append(("dtypes", ", ".join(f"{k} {v:,}" for k, v in found.dtypes.items())))
    if found.quantization is not None:
        bits, group = found.quantization.bits, found.quantization.group
        lines.append(("quantised", f"{bits} bits, in groups of {group}"))
    lines.append(("weights", f"{_size(found.weight_bytes)} in memory"))
    grows = found.state_bytes_per_token
    more = f" and {_size(grows)} per token" if grows else ", at any length"
    lines.append(("state", f"{_size(found.state_bytes)} per sequence{more}"))
    return lines


def _text(value: object) -> str:
    """Formats the fields of a layer: the kind, and the other fields in parentheses."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, dict):
        return str(value)
    fields = ", ".join(f"{k}={_text(v)}" for k, v in value.items() if k != "kind")
    return f"{value['kind']} ({fields})"


def _size(count: int) -> str:
    """Formats a number of bytes with a decimal unit."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
