"""The types of options that the examples share."""

import argparse
import math
from collections.abc import Callable


def number(kind: type[int] | type[float], least: float) -> Callable[[str], int | float]:
    """Returns the type of an option that is a number of at least `least`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, but got {text}")
        return value

    parse.__name__ = kind.__name__  # for the message about a text that is no number
    return parse
