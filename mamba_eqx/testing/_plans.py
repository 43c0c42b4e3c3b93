"""Cases chosen by Hypothesis, the only file here that imports it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

from ._laws import Case
from ._running import CAPACITY, fold


# The lengths of two pieces. Every new length has to be compiled, so there are few of them. 1 and 3
# are shorter than the convolutions; 37 and 40 tokens are more than one chunk of a scan.
CUTS = ((1, 3), (3, 37), (37, 3), (3, 0), (0, 3))


class Plan(NamedTuple):
    """The choices of Hypothesis, small enough to be printed when a law fails."""

    seed: int
    """The seed of the inputs, and of the parameters if they are random."""
    seq: int
    cut: int
    """An index at which to cut the sequence, within `0..seq`."""
    resets: frozenset[int]
    """The tokens at which `reset` is true."""
    fresh: bool
    """Whether to start from the empty past, rather than from the state after five tokens."""


@st.composite
def plans(draw: Any, cuts: Any = CUTS) -> Plan:
    """Chooses a case whose two pieces have one of the lengths `cuts`, or any if that is `None`."""
    # The run-time type checks look at a random item of a sequence, which Hypothesis forbids here.
    if cuts is None:
        seq = draw(st.integers(1, 80))
        cut = draw(st.integers(0, seq))
    else:
        cut, rest = draw(st.sampled_from(cuts))
        seq = cut + rest
    resets = draw(st.frozensets(st.integers(0, seq - 1), max_size=4))
    return Plan(draw(st.integers(0, 2)), seq, cut, resets, draw(st.booleans()))


def make_case(layer: Any, inputs: Callable[[int, int], Any], plan: Plan) -> Case:
    """Makes the arrays of a plan; `inputs(seq, seed)` returns a sequence of tokens."""
    state = layer.init_state(max_len=CAPACITY)
    if not plan.fresh:
        state = fold(layer, inputs(5, plan.seed + 100), state)[1]
    reset = np.isin(np.arange(plan.seq), list(plan.resets))
    return Case(layer, inputs(plan.seq, plan.seed), state, reset, plan.cut)


def check_examples(check: Callable[[Plan], None], examples: int) -> None:
    """Runs `check` for plans, the same ones at every call, and raises what it raised for the
    smallest plan."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(plan=plans())
    def run(plan: Plan) -> None:
        check(plan)

    run()
