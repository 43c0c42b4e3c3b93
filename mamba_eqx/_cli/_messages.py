"""Messages in one line, in the words of the command line."""

import re
import sys

import jax


_LONGEST = 1000
# The library's messages name its Python arguments. Only names that no config or file format also
# uses are listed here.
_WORDS = {
    "or use `token=False` for none": "or unset HF_TOKEN",
    "or `token=False` for none": "or unset HF_TOKEN",
    "pass a `token`": "set HF_TOKEN or give --token-file",
    "pass another `token`": "set HF_TOKEN or give --token-file with another token",
    "`token`": "the token (HF_TOKEN or --token-file)",
    "as `mamba_eqx.save_tokenizer` writes it": "or give --tokenizer bytes",
}
_OPTIONS = (
    "cache_dir",
    "endpoint",
    "force_download",
    "local_files_only",
    "max_new_tokens",
    "max_shard_size",
    "revision",
)
_WORDS |= {
    f"`{name}{value}`": "--" + name.replace("_", "-")
    for name in _OPTIONS
    for value in ("", "=True")
}
_VALUES = re.compile(rf"\b(?:{'|'.join(_OPTIONS)})=")


def one_line(text: str) -> str:
    """Returns a message on a single line, in printable characters, and not longer than a screen."""
    joined = " ".join(text.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined[: 2 * _LONGEST])
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."


def explain(error: BaseException) -> str:
    """Returns the message of an error, with the options of the command line in place of Python's
    arguments."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return (
            "The memory is too small for this model and these lengths. Use a smaller model, "
            "--dtype bfloat16, or fewer tokens."
        )
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        where = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([error.strerror, *where])
    for python, option in _WORDS.items():
        text = text.replace(python, option)
    return one_line(_VALUES.sub("", text)) or type(error).__name__


def print_error(error: BaseException | str) -> None:
    """Writes an error to standard error, on one line."""
    message = error if isinstance(error, str) else explain(error)
    print(f"mamba-eqx: error: {message}", file=sys.stderr)


def print_warning(message: Warning | str, *_: object) -> None:
    """Writes a warning to standard error, on one line. The arguments are those of
    `warnings.showwarning`."""
    print(f"mamba-eqx: warning: {one_line(str(message))}", file=sys.stderr)
