"""The progress bar of a training run."""

import sys
from collections.abc import Mapping

from jaxtyping import PyTree
from tqdm import tqdm

from ._metrics import Scalar
from .data import Batch


class ProgressBar:
    """A progress bar on stderr that counts tokens, or steps if a batch is not a `Batch`."""

    def __init__(self, steps: int):
        """**Arguments:**

        - `steps`: the number of steps at which the bar is full.
        """
        self._steps = steps
        self._bar: tqdm | None = None
        self._unit = 1

    def open(self, batch: PyTree, step: int) -> None:
        """Shows the bar, unless it is shown already. The batch determines the tokens of a step.

        **Arguments:**

        - `batch`: the batch of the next step.
        - `step`: the number of completed steps.
        """
        if self._bar is not None:
            return
        counts_tokens = isinstance(batch, Batch)
        self._unit = batch.tokens.size if counts_tokens else 1
        self._bar = tqdm(
            total=self._steps * self._unit,
            initial=step * self._unit,
            unit="tok" if counts_tokens else "step",
            unit_scale=True,
            # In a log file, ten lines per second would be too many.
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
            miniters=1,
        )

    def advance(self, steps: int, values: Mapping[str, Scalar]) -> None:
        """Moves the bar by a number of steps and shows the metrics of the last one."""
        if self._bar is not None:
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps * self._unit)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Writes the metrics of an evaluation on a line of their own, above the bar."""
        if self._bar is not None:
            shown = ", ".join(f"{name}={float(value):.4g}" for name, value in values.items())
            self._bar.write(f"step {step}: {shown}", file=sys.stderr)

    def close(self) -> None:
        """Closes the bar, which stays visible."""
        if self._bar is not None:
            self._bar.close()
