"""The settings of a training run, which its record and its checkpoints depend on."""

import dataclasses
import math
from types import MappingProxyType

from ..models import (
    BlockConfig,
    LanguageModelConfig,
    Mamba1Config,
    Mamba2Config,
    Mamba3Config,
)


# The default state size of each mixer.
MIXERS = MappingProxyType({"mamba1": 8, "mamba2": 32, "mamba3": 32})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run.

    - `mixer`: the name of the mixer.
    - `d_model`, `layers`, `d_state`: the sizes of the model. A `d_state` of 0 stands for the
        default of the mixer.
    - `steps`: the number of steps.
    - `batch`: the number of rows, which read the text side by side.
    - `length`: the bytes that a row reads in a step.
    - `stretch`: the number of steps before a row jumps to another place in the text.
    - `lr`: the peak learning rate.
    - `seed`: the seed of the initial parameters and of the places.
    """

    mixer: str = "mamba1"
    d_model: int = 64
    layers: int = 2
    d_state: int = 0
    steps: int = 1000
    batch: int = 8
    length: int = 128
    stretch: int = 16
    lr: float = 3e-3
    seed: int = 0


PRESETS = MappingProxyType(
    {
        "small": Settings(),
        "bundled": Settings(d_model=192, layers=6, steps=11_000, batch=16),
    }
)


def option(name: str) -> str:
    """Returns the option of a setting."""
    return f"--{name.replace('_', '-')}"


def config_of(settings: Settings) -> LanguageModelConfig:
    """Returns the config of a byte-level model."""
    d_model, d_state = settings.d_model, settings.d_state
    headdim = math.gcd(64, 2 * d_model)  # It must divide the inner width.
    mixer = {
        "mamba1": lambda: Mamba1Config(d_model, d_state=d_state),
        "mamba2": lambda: Mamba2Config(d_model, d_state=d_state, headdim=headdim),
        "mamba3": lambda: Mamba3Config(d_model, d_state=d_state, headdim=headdim),
    }[settings.mixer]()
    return LanguageModelConfig(256, (BlockConfig(mixer),) * settings.layers)
