"""Looking inside of models."""

from ._selective import (
    MixerInput as MixerInput,
    half_lives as half_lives,
    mixer_inputs as mixer_inputs,
    mixing_matrices as mixing_matrices,
    state_norms as state_norms,
    step_sizes as step_sizes,
)
from ._summary import Part as Part, Summary as Summary, summary as summary


__all__ = [
    "MixerInput",
    "Part",
    "Summary",
    "half_lives",
    "mixer_inputs",
    "mixing_matrices",
    "state_norms",
    "step_sizes",
    "summary",
]
