"""The configs of the MLPs, one per file."""

from typing import Any

from ...layers import MLP, GatedMLP, MixtureOfExperts
from ._base import AbstractMLPConfig as AbstractMLPConfig
from ._gated_mlp import GatedMLPConfig as GatedMLPConfig
from ._mixture import MixtureOfExpertsConfig as MixtureOfExpertsConfig
from ._mlp import MLPConfig as MLPConfig


# One entry for each MLP.
MLP_CONFIGS: dict[type, type[AbstractMLPConfig[Any]]] = {
    MLP: MLPConfig,
    GatedMLP: GatedMLPConfig,
    MixtureOfExperts: MixtureOfExpertsConfig,
}
