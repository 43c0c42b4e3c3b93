"""Measures the op of Mamba-2: time per token and layer, and memory, by chunk size.

    python benchmarks/ssd.py [--quick] [--no-peers]

The shape is mamba2-130m's (24 heads of 64 channels, one group, d_state 128), in float32. "both" is
a forward and a backward pass, with gradients of all inputs.

Older releases of transformers have no separate function for this op, and use tensors of shape
`(chunk, chunk, heads, d_state)` instead of matrix products. With such a release installed, the
whole mixers are compared, between projections so narrow that their time is negligible:

    pip install "transformers==4.57.1" && python benchmarks/ssd.py
"""

from collections.abc import Callable
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
    temporary_mib,
)
from _peers import available, check_agrees
from jaxtyping import PyTree

import mamba_eqx as mbx


Inputs = tuple[jax.Array, ...]
Method = Literal["sequential", "chunked"]
Pass = Callable[..., PyTree]
"""A function of `inputs`."""


def inputs(mixer: mbx.Mamba2Config, seq: int) -> Inputs:
    """Returns `x`, `dt`, `A`, `B`, `C`, `D` and the gradient of the outputs."""
    nheads = mixer.d_ssm // mixer.headdim
    x_key, dt_key, A_key, B_key, C_key, y_key = jr.split(jr.key(0), 6)
    x = jr.normal(x_key, (seq, nheads, mixer.headdim))
    dt = jnp.exp(jr.uniform(dt_key, (seq, nheads), minval=np.log(1e-3), maxval=np.log(0.1)))
    A = -jr.uniform(A_key, (nheads,), minval=1.0, maxval=16.0)
    B = jr.normal(B_key, (seq, mixer.ngroups, mixer.d_state))
    C = jr.normal(C_key, (seq, mixer.ngroups, mixer.d_state))
    return x, dt, A, B, C, jnp.ones(nheads), jr.normal(y_key, x.shape)


def forward(method: Method | None = None, chunk_size: int | None = None) -> Pass:
    """Returns the forward pass, as a function of `inputs`."""
    return lambda x, dt, A, B, C, D, _: mbx.ops.ssd(
        x, dt, A, B, C, D, method=method, chunk_size=chunk_size
    )[0]


def both(method: Method | None = None, chunk_size: int | None = None) -> Pass:
    """Returns the forward and the backward pass, as a function of `inputs`."""

    def run(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, pull = jax.vjp(lambda *args: forward(method, chunk_size)(*args, None), *args[:-1])
        return y, pull(args[-1])

    return run


def ours(args: Inputs, chunks: list[int]) -> tuple[dict[str, Pair], dict[str, float]]:
    """Returns the passes of each variant, and the temporary memory in MiB of both passes."""
    variants: dict[str, tuple[Method | None, int | None]] = {
        f"chunks of {size}": (None, size) for size in chunks
    }
    variants["sequential"] = ("sequential", None)
    runs, used = {}, {}
    for name, options in variants.items():
        run, executable = compiled(both(*options), *args)
        runs[name] = compiled(forward(*options), *args)[0], run
        used[name] = temporary_mib(executable)
    return runs, used


def peers(args: Inputs, chunks: list[int]) -> dict[str, Pair]:
    """Returns the passes of the function that transformers' `Mamba2Mixer` calls without kernels."""
    import torch
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x, dt, A, B, C, D, y_bar = (torch.from_numpy(np.array(t)) for t in args)
    tensors = [x[None], dt[None], A, B[None], C[None], D]
    for t in tensors:
        t.requires_grad_()

    def pair(chunk_size: int) -> Pair:
        def run(*args: torch.Tensor) -> torch.Tensor:
            x, dt, A, B, C, D = args
            return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run(*tensors)

        return forward, lambda: torch.autograd.grad(run(*tensors), tensors, y_bar[None])

    return {f"transformers, chunks of {size}": pair(size) for size in chunks}


def narrow_mixers(seq: int, chunks: list[int], *, quick: bool) -> dict[str, Pair]:
    """Returns the passes of whole mixers with `d_model` 8 and otherwise the same sizes."""
    import torch
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = mbx.Mamba2Config(8, d_inner=256 if quick else 1536, headdim=64, d_state=128)
    mixer = config.build(key=jr.key(0))
    x = jr.normal(jr.key(1), (seq, 8))

    def loss(mixer: mbx.Mamba2, x: jax.Array) -> jax.Array:
        return jnp.sum(mixer(x))

    both = jax.grad(loss, argnums=(0, 1))
    runs = {"mamba_eqx": (compiled(loss, mixer, x)[0], compiled(both, mixer, x)[0])}
    numbers = torch.from_numpy(np.array(x))[None].requires_grad_()
    for size in chunks:
        theirs = Mamba2Mixer(
            Mamba2Config(
                hidden_size=8,
                expand=config.d_inner // 8,
                num_heads=config.d_ssm // 64,
                head_dim=64,
                state_size=128,
                n_groups=1,
                chunk_size=size,
            ),
            0,
        )
        wanted = [numbers, *theirs.parameters()]

        def forward(theirs: Any = theirs) -> torch.Tensor:
            with torch.no_grad():
                return theirs.torch_forward(numbers)

        def backward(
            theirs: Any = theirs, wanted: list[torch.Tensor] = wanted
        ) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(theirs.torch_forward(numbers).sum(), wanted)

        runs[f"transformers, chunks of {size}"] = forward, backward
    return runs


def compare_narrow_mixers(seq: int, *, quick: bool) -> None:
    """Measures whole mixers of ours and of transformers."""
    runs = narrow_mixers(seq, [16] if quick else [64, 256], quick=quick)
    f_seconds = medians({name: f for name, (f, _) in runs.items()}, repeats=5)
    fb_seconds = medians({name: fb for name, (_, fb) in runs.items()}, repeats=5)
    f_ours, fb_ours = f_seconds["mamba_eqx"], fb_seconds["mamba_eqx"]
    rows = [
        (name, 1e3 * f, 1e3 * fb_seconds[name], f / f_ours, fb_seconds[name] / fb_ours)
        for name, f in f_seconds.items()
    ]
    print(f"\nMilliseconds of one mixer with narrow projections, {seq} tokens:\n")
    print_table(("", "forward", "both", "forward / ours", "both / ours"), rows)


def main() -> None:
    options = arguments(__doc__)
    quick = options.quick
    print_facts("State-space duality", quick=quick)
    has_peer, has_function = False, False
    if not options.no_peers and available("torch") and available("transformers"):
        import torch
        import transformers
        from transformers.models.mamba2 import modeling_mamba2

        torch.set_num_threads(cores())
        transformers.logging.set_verbosity_error()
        has_peer, has_function = True, hasattr(modeling_mamba2, "mamba2_chunk_scan")
    seq = 64 if quick else 2048
    mixer = mbx.Mamba2Config(128 if quick else 768)
    args = inputs(mixer, seq)
    runs, used = ours(args, [16, 32] if quick else [16, 32, 64, 128, 256])
    if has_function:
        found = peers(args, [16] if quick else [64, 256])
        for name, (run, _) in found.items():
            check_agrees(name, run()[0], forward()(*args))
        runs |= found
    forwards: Competitors = {name: f for name, (f, _) in runs.items()}
    boths: Competitors = {name: fb for name, (_, fb) in runs.items()}
    f_seconds, fb_seconds = medians(forwards), medians(boths)
    per_token = 1e6 / seq
    usual = "chunks of 32"
    rows = [
        (
            name,
            f_seconds[name] * per_token,
            fb_seconds[name] * per_token,
            f_seconds[name] / f_seconds[usual],
            fb_seconds[name] / fb_seconds[usual],
            used.get(name),
        )
        for name in runs
    ]
    print(f"Microseconds per token and layer, {seq} tokens, d_inner {mixer.d_inner}:\n")
    header = ("", "forward", "both", f"forward / {usual}", f"both / {usual}", "memory of both, MiB")
    print_table(header, rows)
    if has_peer and not has_function:
        compare_narrow_mixers(seq, quick=quick)


if __name__ == "__main__":
    main()
