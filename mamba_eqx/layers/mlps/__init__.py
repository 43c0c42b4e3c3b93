"""Maps of single tokens, one per file."""

from ._gated_mlp import GatedMLP as GatedMLP
from ._mlp import MLP as MLP
from ._protocol import AbstractMLP as AbstractMLP
