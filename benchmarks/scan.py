"""Measures the selective scan: time per token and layer, and memory, of all methods and peers.

    python benchmarks/scan.py [--quick] [--no-peers]

The shape is mamba-130m's (d_inner 1536, d_state 16), in float32. "both" is a forward and a
backward pass, with gradients of all inputs.
"""

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import (
    Competitors,
    Pair,
    arguments,
    compiled,
    cores,
    medians,
    print_facts,
    print_table,
    print_verdict,
    temporary_mib,
)
from _peers import available, check_agrees
from jax import lax
from jaxtyping import PyTree

import mamba_eqx as mbx


Inputs = tuple[jax.Array, ...]
Method = Literal["sequential", "associative", "chunked"]
METHODS: tuple[Method, ...] = ("chunked", "sequential", "associative")
Pass = Callable[..., PyTree]
"""A function of `inputs`."""

D_STATE = 16


def inputs(d_inner: int, seq: int, batch: int | None = None) -> Inputs:
    """Returns `x`, `dt`, `A`, `B`, `C`, `D` and the gradient of the outputs."""
    lead = (seq,) if batch is None else (batch, seq)
    x_key, dt_key, B_key, C_key, y_key = jr.split(jr.key(0), 5)
    x = jr.normal(x_key, (*lead, d_inner))
    dt = jnp.exp(jr.uniform(dt_key, (*lead, d_inner), minval=np.log(1e-3), maxval=np.log(0.1)))
    A = -jnp.tile(jnp.arange(1.0, D_STATE + 1), (d_inner, 1))
    B = jr.normal(B_key, (*lead, D_STATE))
    C = jr.normal(C_key, (*lead, D_STATE))
    return x, dt, A, B, C, jnp.ones(d_inner), jr.normal(y_key, (*lead, d_inner))


AXES = (0, 0, None, 0, 0, None, 0)


def forward(method: Method | None = None, chunk_size: int | None = None) -> Pass:
    """Returns the forward pass, as a function of `inputs`."""
    return lambda x, dt, A, B, C, D, _: mbx.ops.selective_scan(
        x, dt, A, B, C, D, method=method, chunk_size=chunk_size
    )[0]


def both(method: Method | None = None, chunk_size: int | None = None) -> Pass:
    """Returns the forward and the backward pass, as a function of `inputs`."""

    def run(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, pull = jax.vjp(lambda *args: forward(method, chunk_size)(*args, None), *args[:-1])
        return y, pull(args[-1])

    return run


def batched(run: Pass) -> Pass:
    """Returns a function of a batch of inputs that uses `jax.vmap`."""
    return jax.vmap(run, in_axes=AXES)


def mapped(run: Pass) -> Pass:
    """Returns a function of a batch of inputs that runs one sequence after another."""

    def over_batch(*args: jax.Array) -> PyTree:
        x, dt, A, B, C, D, y_bar = args
        return lax.map(lambda t: run(t[0], t[1], A, t[2], t[3], D, t[4]), (x, dt, B, C, y_bar))

    return over_batch


def ours(d_inner: int, seq: int, batch: int | None) -> dict[str, Pair]:
    """Returns the passes of each method."""
    args = inputs(d_inner, seq, batch)
    lift = batched if batch else lambda run: run
    variants: dict[str, tuple[Pass, Pass]] = {}
    for method in METHODS:
        variants[method] = (lift(forward(method=method)), lift(both(method=method)))
    if batch:
        variants["chunked, lax.map over the batch"] = (mapped(forward()), mapped(both()))
    return {
        name: (compiled(f, *args)[0], compiled(fb, *args)[0]) for name, (f, fb) in variants.items()
    }


def peers(d_inner: int, seq: int, batch: int | None) -> dict[str, Pair]:
    """Returns the functions of transformers and mamba.py, on the same numbers."""
    import torch

    torch.set_num_threads(cores())
    args = [torch.from_numpy(np.array(t)) for t in inputs(d_inner, seq, batch)]
    if not batch:
        args = [t[None] if axis == 0 else t for t, axis in zip(args, AXES, strict=True)]
    *args, y_bar = args
    for t in args:
        t.requires_grad_()

    def pair(run: Callable[..., Any]) -> Pair:
        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run(*args)

        return forward, lambda: torch.autograd.grad(run(*args), args, y_bar)

    found = {}
    if available("transformers"):
        import transformers
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        transformers.logging.set_verbosity_error()

        def loop(*args: torch.Tensor) -> torch.Tensor:
            x, dt, A, B, C, D = args
            x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
            return mamba_selective_scan(x, dt, A, B, C, D).transpose(1, 2)

        found["transformers (PyTorch loop)"] = pair(loop)
    if available("mambapy"):
        block = importlib.import_module("mambapy.mamba").MambaBlock
        found["mamba.py (pscan)"] = pair(partial(block.selective_scan, None))
    return found


def check(peers: dict[str, Pair], args: Inputs) -> None:
    """Compares the outputs of the peers with ours."""
    y = forward()(*args)
    for name, (run, _) in peers.items():
        check_agrees(name, run()[0], y)


def times(d_inner: int, sizes: list[tuple[int, int | None]], with_peers: bool) -> None:
    """Measures the passes of all methods and peers, for each `(seq, batch)` of `sizes`."""
    rows = []
    for seq, batch in sizes:
        runs = ours(d_inner, seq, batch)
        if with_peers:
            found = peers(d_inner, seq, batch)
            if not batch:
                check(found, inputs(d_inner, seq))
            runs |= found
        forwards: Competitors = {name: f for name, (f, _) in runs.items()}
        boths: Competitors = {name: fb for name, (_, fb) in runs.items()}
        f_seconds, fb_seconds = medians(forwards), medians(boths)
        per_token = 1e6 / (seq * (batch or 1))
        for name in runs:
            f, fb = f_seconds[name] * per_token, fb_seconds[name] * per_token
            ratio = f_seconds[name] / f_seconds["chunked"], fb_seconds[name] / fb_seconds["chunked"]
            rows.append((batch or 1, seq, name, f, fb, *ratio))
    print(f"Microseconds per token and layer, d_inner {d_inner}, d_state {D_STATE}:\n")
    print_table(
        ("batch", "seq", "", "forward", "both", "forward / chunked's", "both / chunked's"), rows
    )


def chunk_sizes(seq: int, widths: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Measures both passes by chunk size, for each `d_inner` of `widths`."""
    rows = []
    for d_inner, batch in itertools.product(widths, (None, 4)):
        args = inputs(d_inner, seq, batch)
        lift = batched if batch else lambda run: run
        runs: Competitors = {
            str(size): compiled(lift(both(chunk_size=size)), *args)[0] for size in sizes
        }
        per_token = 1e6 / (seq * (batch or 1))
        rows.append((d_inner, batch or 1, *(t * per_token for t in medians(runs).values())))
    print(f"Forward and backward by chunk size, microseconds per token, {seq} tokens:\n")
    print_table(("d_inner", "batch", *map(str, sizes)), rows)


def memory(seq: int, d_inner: int) -> float:
    """Prints the temporary memory of each method, and returns that of both passes in chunks."""
    rows, needed = [], {}
    args = inputs(d_inner, seq)
    for method in METHODS:
        sizes = []
        for run in (forward(method=method), both(method=method)):
            sizes.append(temporary_mib(compiled(run, *args)[1]))
        rows.append((method, *sizes))
        needed[method] = sizes[1]
    print(f"Temporary memory in MiB, {seq} tokens, d_inner {d_inner}:\n")
    print_table(("", "forward", "both"), rows)
    return needed["chunked"]


def main() -> None:
    args = arguments(__doc__)
    quick = args.quick
    print_facts("Selective scan", quick=quick)
    with_peers = not args.no_peers and available("torch")
    sizes = [(64, None), (64, 4)] if quick else [(512, None), (2048, None), (512, 4)]
    times(64 if quick else 1536, sizes, with_peers)
    if quick:
        chunk_sizes(32, (64,), (8, 16))
        memory(128, 64)
    else:
        chunk_sizes(512, (512, 1536), (8, 16, 32, 64, 128))
        used = memory(8192, 1536)
        what = "MiB for the backward pass of one layer at 8192 tokens"
        print_verdict(what, used, 200, at_most=True)


if __name__ == "__main__":
    main()
