from ._mamba1 import Mamba1 as Mamba1, Mamba1State as Mamba1State
