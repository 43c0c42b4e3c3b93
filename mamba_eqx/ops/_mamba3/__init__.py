"""The recurrence of Mamba-3: one step, and two methods to scan a sequence."""

from ._scan import mamba3 as mamba3
from ._step import mamba3_step as mamba3_step
