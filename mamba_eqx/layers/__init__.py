"""The protocol of sequence layers, and the layers that implement it."""

from ._arguments import (
    check_reset_and_length as check_reset_and_length,
    checked_state as checked_state,
)
from ._bidirectional import Bidirectional as Bidirectional
from ._block import Block as Block
from ._cache import AbstractCache as AbstractCache, with_room as with_room
from ._conv import CausalConv1d as CausalConv1d
from ._linear import Linear as Linear, product as product
from ._mlp import GatedMLP as GatedMLP
from ._norm import GatedRMSNorm as GatedRMSNorm, norm as norm
from ._protocol import AbstractSequenceLayer as AbstractSequenceLayer
from ._recurrence_parameters import (
    RECURRENCE as RECURRENCE,
    cast as cast,
    recurrence_mask as recurrence_mask,
)
from ._stack import AbstractStack as AbstractStack, Stacked as Stacked, Unrolled as Unrolled
from .mixers import (
    Attention as Attention,
    KVCache as KVCache,
    Mamba1 as Mamba1,
    Mamba1State as Mamba1State,
    Mamba2 as Mamba2,
    Mamba2State as Mamba2State,
    Mamba3 as Mamba3,
    Mamba3State as Mamba3State,
    check_A as check_A,
    check_attention as check_attention,
    check_d_ssm as check_d_ssm,
    check_dt_limit as check_dt_limit,
    check_heads as check_heads,
    check_rope_fraction as check_rope_fraction,
    check_select_norm as check_select_norm,
)


# The public names. The others are for the other folders of the package.
__all__ = [
    "RECURRENCE",
    "AbstractCache",
    "AbstractSequenceLayer",
    "AbstractStack",
    "Attention",
    "Bidirectional",
    "Block",
    "CausalConv1d",
    "GatedMLP",
    "GatedRMSNorm",
    "KVCache",
    "Linear",
    "Mamba1",
    "Mamba1State",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "Stacked",
    "Unrolled",
    "cast",
    "recurrence_mask",
    "with_room",
]
