"""The option for quantised weights."""

import argparse

from ..models import Quantization


def add_bits(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the number of bits of weights."""
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 4),
        help="number of bits to which the weights of linear maps are quantised while loading "
        "(default: as stored)",
    )


def quantization_from_args(args: argparse.Namespace) -> Quantization | None:
    """Returns what the option of `add_bits` describes."""
    return None if args.bits is None else Quantization(args.bits)
