"""A byte-level model for the commands, and commands as child processes."""

import signal
import subprocess
import sys

import equinox as eqx
import jax.random as jr

import mamba_eqx as mbx
from mamba_eqx import _cli


def byte_model(vocab_size=256):
    block = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
    model = mbx.LanguageModelConfig(vocab_size, (block,)).build(key=jr.key(0))
    # Most generated text is printable, since the logits of lowercase letters are raised.
    weight = model.embedding.weight.at[97:123].multiply(30)
    return eqx.tree_at(lambda model: model.embedding.weight, model, weight)


def call(*args: object) -> int:
    """Runs the command in this process, and returns its exit code."""
    try:
        return _cli.main([*map(str, args)])
    except SystemExit as exit:
        return -1 if exit.code is None or isinstance(exit.code, str) else exit.code


def spawn(*args: object) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "mamba_eqx", *map(str, args)]
    # A child process inherits ignored signals, and background jobs of a shell ignore SIGINT, but it
    # does not inherit handlers.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    finally:
        signal.signal(signal.SIGINT, previous)
