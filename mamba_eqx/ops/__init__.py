"""The mathematics of the layers as functions of arrays."""

from ._attention import attention as attention, attention_step as attention_step
from ._conv import causal_conv1d as causal_conv1d, causal_conv1d_step as causal_conv1d_step
from ._gated_delta import gated_delta as gated_delta, gated_delta_step as gated_delta_step
from ._grouped_product import grouped_product as grouped_product
from ._mamba3 import mamba3 as mamba3, mamba3_step as mamba3_step
from ._masks import (
    as_int32 as as_int32,
    document_positions as document_positions,
    fill_padding as fill_padding,
    real_tokens as real_tokens,
)
from ._narrow_product import as_dot_general as as_dot_general, narrow_product as narrow_product
from ._norm import gated_rms_norm as gated_rms_norm
from ._pieces import CONTEXT_AXIS as CONTEXT_AXIS, from_first_piece as from_first_piece
from ._quantize_weight import (
    GROUP_UNIT as GROUP_UNIT,
    QuantizedWeight as QuantizedWeight,
    quantize_weight as quantize_weight,
)
from ._quantized_product import (
    dequantize_weight as dequantize_weight,
    quantized_product as quantized_product,
)
from ._recurrence import linear_recurrence as linear_recurrence
from ._rotary import rotary_embedding as rotary_embedding
from ._selective_scan import (
    selective_scan as selective_scan,
    selective_scan_step as selective_scan_step,
)
from ._ssd import ssd as ssd, ssd_step as ssd_step


# The public names. Other folders of the package may import the other names too.
__all__ = [
    "QuantizedWeight",
    "attention",
    "attention_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "dequantize_weight",
    "document_positions",
    "gated_delta",
    "gated_delta_step",
    "gated_rms_norm",
    "grouped_product",
    "linear_recurrence",
    "mamba3",
    "mamba3_step",
    "narrow_product",
    "quantize_weight",
    "quantized_product",
    "rotary_embedding",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
