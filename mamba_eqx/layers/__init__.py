"""The protocol of sequence layers, and the layers that implement it."""

from ._arguments import (
    check_reset_and_length as check_reset_and_length,
    checked_state as checked_state,
    without_padding as without_padding,
)
from ._bidirectional import Bidirectional as Bidirectional
from ._block import Block as Block
from ._cache import AbstractCache as AbstractCache, with_room as with_room
from ._conv import CausalConv1d as CausalConv1d
from ._joined import JoinedLinear as JoinedLinear
from ._linear import AbstractLinear as AbstractLinear, Linear as Linear, product as product
from ._norm import GatedRMSNorm as GatedRMSNorm, Norm as Norm, make_norm as make_norm
from ._protocol import (
    AbstractSequenceLayer as AbstractSequenceLayer,
    Length as Length,
    Reset as Reset,
)
from ._quantized import QuantizedLinear as QuantizedLinear
from ._recurrence_parameters import (
    FLOAT32 as FLOAT32,
    RECURRENCE as RECURRENCE,
    cast as cast,
    float32_mask as float32_mask,
    recurrence_mask as recurrence_mask,
)
from ._scaled import scaled as scaled
from ._stack import (
    AbstractStack as AbstractStack,
    Remat as Remat,
    Unrolled as Unrolled,
)
from ._stacked import Stacked as Stacked
from .mixers import (
    Attention as Attention,
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaNetState as GatedDeltaNetState,
    KVCache as KVCache,
    Mamba1 as Mamba1,
    Mamba1Selection as Mamba1Selection,
    Mamba1State as Mamba1State,
    Mamba2 as Mamba2,
    Mamba2Selection as Mamba2Selection,
    Mamba2State as Mamba2State,
    Mamba3 as Mamba3,
    Mamba3State as Mamba3State,
    Parallel as Parallel,
    check_attention as check_attention,
    check_gated_delta_net as check_gated_delta_net,
    check_mamba1 as check_mamba1,
    check_mamba2 as check_mamba2,
    check_mamba3 as check_mamba3,
    check_parallel as check_parallel,
)
from .mlps import (
    MLP as MLP,
    AbstractMLP as AbstractMLP,
    GatedMLP as GatedMLP,
    MixtureOfExperts as MixtureOfExperts,
    Router as Router,
    Routes as Routes,
    Routing as Routing,
    check_mixture as check_mixture,
)


# The public names. Other folders of the package may import the other names too.
__all__ = [
    "FLOAT32",
    "MLP",
    "RECURRENCE",
    "AbstractCache",
    "AbstractLinear",
    "AbstractMLP",
    "AbstractSequenceLayer",
    "AbstractStack",
    "Attention",
    "Bidirectional",
    "Block",
    "CausalConv1d",
    "GatedDeltaNet",
    "GatedDeltaNetState",
    "GatedMLP",
    "GatedRMSNorm",
    "JoinedLinear",
    "KVCache",
    "Linear",
    "Mamba1",
    "Mamba1Selection",
    "Mamba1State",
    "Mamba2",
    "Mamba2Selection",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "MixtureOfExperts",
    "Parallel",
    "QuantizedLinear",
    "Router",
    "Routes",
    "Stacked",
    "Unrolled",
    "cast",
    "float32_mask",
    "recurrence_mask",
    "with_room",
    "without_padding",
]
