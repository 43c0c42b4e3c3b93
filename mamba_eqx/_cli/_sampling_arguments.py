"""The command-line options for sampling tokens."""

import argparse
from collections.abc import Callable

import numpy as np

from ..generation import Sampling, sampling
from ._arguments import integer, number, stop_text
from ._opened import Opened


_FLOAT32 = np.finfo(np.float32)
_TINY, _HUGE = float(_FLOAT32.tiny), float(_FLOAT32.max)
_INT32 = 2**31 - 1
# Penalties are added up over the window, and the sum has to stay finite in float32.
_MAX_PENALTY = 1e30
_MAX_WINDOW = 2**20
_TEMPERATURE = number(
    f"0, or a number within {_TINY:.2g}..{_HUGE:.2g}", lambda x: x == 0 or _TINY <= x <= _HUGE
)
_MASS = number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
_SHARE = number("a number within 0..1", lambda x: 0 <= x <= 1)
_FACTOR = number(
    f"a number within {1 / _MAX_PENALTY:g}..{_MAX_PENALTY:g}",
    lambda x: 1 / _MAX_PENALTY <= x <= _MAX_PENALTY,
)
_TERM = number(
    f"a number within {-_MAX_PENALTY:g}..{_MAX_PENALTY:g}", lambda x: abs(x) <= _MAX_PENALTY
)


def add_sampling(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, stop: str, stop_default: str
) -> None:
    """Adds the options for sampling tokens and for ending a text.

    **Arguments:**

    - `parser`: the parser of a command.
    - `max_new_tokens`: the default of that option.
    - `stop`, `stop_default`: the help of the option `--stop`, and its default in words.
    """

    def add(
        name: str,
        metavar: str,
        kind: Callable[[str], int | float],
        text: str,
        default: int | float | None,
    ) -> None:
        shown = "off" if default is None else default
        text = f"{text} (default: {shown})"
        parser.add_argument(name, metavar=metavar, type=kind, help=text, default=default)

    count = integer(1, _INT32)
    add("--max-new-tokens", "N", count, "maximum number of tokens to generate", max_new_tokens)
    add(
        "--temperature",
        "T",
        _TEMPERATURE,
        "sampling temperature; 0 takes the most likely token",
        0.8,
    )
    top_k = integer(0, _INT32)
    add("--top-k", "K", top_k, "sample from the K most likely tokens; 0 keeps all", None)
    add("--top-p", "P", _MASS, "sample from the most likely tokens with total probability P", None)
    add(
        "--min-p",
        "P",
        _SHARE,
        "sample from the tokens whose probability is at least P times the highest one",
        None,
    )
    add("--typical-p", "P", _MASS, "sample from typical tokens with total probability P", None)
    add("--repetition-penalty", "X", _FACTOR, "divide the logits of recent tokens by X", 1.0)
    add("--presence-penalty", "X", _TERM, "subtract X from the logits of recent tokens", 0.0)
    add("--frequency-penalty", "X", _TERM, "subtract X for each recent occurrence of a token", 0.0)
    window = integer(1, _MAX_WINDOW)
    add("--penalty-window", "N", window, "number of recent tokens that penalties consider", 64)
    add("--seed", "SEED", integer(0, 2**32 - 1), "seed of the random numbers", 0)
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        type=stop_text,
        action="append",
        default=[],
        help=f"{stop}; may be repeated (default: {stop_default})",
    )


def sampling_from_args(args: argparse.Namespace, opened: Opened) -> Sampling:
    """Returns the sampling options for a model, as the options of `add_sampling` describe them.

    `--stop` is not among them. It is matched on the text that is printed, not on the bytes of
    tokens, because the two can differ: SentencePiece drops the space before the first token.
    """
    penalties = sampling.Penalties(
        repetition=args.repetition_penalty,
        presence=args.presence_penalty,
        frequency=args.frequency_penalty,
        window=args.penalty_window,
    )
    neutral = sampling.Penalties(window=args.penalty_window)
    options = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        penalties=None if penalties == neutral else penalties,
    )
    return options.for_model(opened.model, opened.tokenizer)
