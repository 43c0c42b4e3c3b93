"""Mixers, one per file. No mixer imports another one."""

from ._attention import Attention as Attention, KVCache as KVCache
from ._gated_delta_net import (
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaNetState as GatedDeltaNetState,
)
from ._mamba1 import (
    Mamba1 as Mamba1,
    Mamba1Selection as Mamba1Selection,
    Mamba1State as Mamba1State,
)
from ._mamba2 import (
    Mamba2 as Mamba2,
    Mamba2Selection as Mamba2Selection,
    Mamba2State as Mamba2State,
)
from ._mamba3 import Mamba3 as Mamba3, Mamba3State as Mamba3State
from ._parallel import Parallel as Parallel
from ._validation import (
    check_attention as check_attention,
    check_gated_delta_net as check_gated_delta_net,
    check_mamba1 as check_mamba1,
    check_mamba2 as check_mamba2,
    check_mamba3 as check_mamba3,
    check_parallel as check_parallel,
)
