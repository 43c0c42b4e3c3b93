from ._attention import Attention as Attention, KVCache as KVCache
from ._mamba1 import Mamba1 as Mamba1, Mamba1State as Mamba1State
from ._mamba2 import Mamba2 as Mamba2, Mamba2State as Mamba2State
from ._mamba3 import Mamba3 as Mamba3, Mamba3State as Mamba3State
