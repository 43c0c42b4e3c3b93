"""Maps of single tokens, one per file."""

from ._gated_mlp import GatedMLP as GatedMLP
from ._mixture import MixtureOfExperts as MixtureOfExperts
from ._mlp import MLP as MLP
from ._protocol import AbstractMLP as AbstractMLP
from ._router import Router as Router, Routes as Routes
from ._validation import Routing as Routing, check_mixture as check_mixture
