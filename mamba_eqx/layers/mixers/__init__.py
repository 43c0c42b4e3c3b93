"""Mixers, one per file. A mixer never imports another one."""

from ._attention import Attention as Attention, KVCache as KVCache
from ._mamba1 import Mamba1 as Mamba1, Mamba1State as Mamba1State
from ._mamba2 import Mamba2 as Mamba2, Mamba2State as Mamba2State
from ._mamba3 import Mamba3 as Mamba3, Mamba3State as Mamba3State
from ._validation import (
    check_A as check_A,
    check_attention as check_attention,
    check_d_ssm as check_d_ssm,
    check_dt_limit as check_dt_limit,
    check_heads as check_heads,
    check_rope_fraction as check_rope_fraction,
    check_select_norm as check_select_norm,
)
