"""Arguments that the kernels of the selective scan refuse. Skipped where mamba-eqx-native is not
installed."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import pytest


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mamba_eqx_native") is None, reason="mamba-eqx-native is not installed"
)


def test_invalid_arguments_raise():
    scan = importlib.import_module("mamba_eqx_native").selective_scan
    for name, array, message in [
        ("x", jnp.zeros((2, 3, 5), jnp.bfloat16), "`x` must be float32, but got bfloat16"),
        ("reset", jnp.zeros((2, 3)), "`reset` must be bool, but got float32"),
        ("A", jnp.zeros(5), "`A` must have 2 axes after those of the batch"),
        ("start", jnp.zeros((1, 4, 5)), "`start` must have 2 axes after those of the batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            scan(**(chunks() | {name: array}), keep_starts=False)
    batch = {name: jnp.stack([array] * 2) for name, array in chunks().items()}
    with pytest.raises(ValueError, match="must have the same sizes or 1"):
        scan(**(batch | {"B": jnp.zeros((3, 2, 3, 4))}), keep_starts=False)


def test_the_library_itself_checks_its_arguments():
    native = importlib.import_module("mamba_eqx_native")
    good = chunks()
    *_, starts = native.selective_scan(**good, keep_starts=True)
    bars = {"starts": starts, "y_bar": jnp.zeros((2, 3, 5)), "end_bar": jnp.zeros((4, 5))}
    for name in (*good, *bars):
        # One token of each chunk, one channel, or one chunk.
        cut = {key: a[:, :1] if key == name else a for key, a in (good | bars).items()}
        forward = {key: cut[key] for key in good}
        reverse = {key: a for key, a in cut.items() if key != "start"}
        if name in good and name != "x":
            with pytest.raises(Exception, match="do not fit together"):
                jax.block_until_ready(native.selective_scan(**forward, keep_starts=False))
        if name != "start":
            with pytest.raises(Exception, match="do not fit together"):
                jax.block_until_ready(native.selective_scan_reverse(**reverse))


def chunks() -> dict[str, jax.Array]:
    """Returns valid arguments of the kernels: 2 chunks of 3 tokens, 5 channels, 4 states."""
    return {
        "x": jnp.ones((2, 3, 5)),
        "dt": jnp.ones((2, 3, 5)),
        "B": jnp.ones((2, 3, 4)),
        "C": jnp.ones((2, 3, 4)),
        "A": -jnp.ones((4, 5)),
        "reset": jnp.zeros((2, 3), bool),
        "start": jnp.zeros((4, 5)),
    }
