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
        """Shows the bar before the first batch, which tells how many tokens a step has.

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
            # A log file gets a line now and then instead of ten a second.
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
            miniters=1,
        )

    def advance(self, steps: int, values: Mapping[str, Scalar]) -> None:
        """Moves the bar by a number of steps and shows the metrics of the last one."""
        if self._bar is not None:
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps * self._unit)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
