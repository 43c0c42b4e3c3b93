"""The precision that matrix products ask for, which matters on accelerators only."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from mamba_eqx.ops import _chunks
from tests.support.cases import fixed_case
from tests.support.registry import MIXERS


HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def precisions(run: Any, *args: Any) -> list[Any]:
    """Returns the precision of every matrix product of a function."""

    def products(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(inner, Jaxpr | ClosedJaxpr):
                        yield from products(getattr(inner, "jaxpr", inner))

    return list(products(jax.make_jaxpr(run)(*args).jaxpr))


def test_decays_are_summed_in_highest_precision():
    visible = jnp.tril(jnp.ones((8, 8), bool))
    assert precisions(_chunks.decays_between, -jnp.ones((3, 8)), visible) == [HIGHEST]


@pytest.mark.parametrize("name", ["mamba2", "mamba3", "mamba3_mimo", "gated_delta_net"])
def test_scan_sums_decays_in_highest_precision(name: str):
    layer, x = fixed_case(name, 40)
    expected = 2 if name.startswith("mamba3") else 1  # Angles are sums as well.
    assert precisions(layer, x).count(HIGHEST) == expected


@pytest.mark.parametrize("name", MIXERS)
def test_all_products_follow_the_default_precision(name: str):
    """`jax.default_matmul_precision` is the remedy that docs/speed.md names."""
    layer, x = fixed_case(name, 40)
    with jax.default_matmul_precision("highest"):
        found = precisions(layer, x)
    assert set(found) <= {HIGHEST}
    assert found or name == "conv"
