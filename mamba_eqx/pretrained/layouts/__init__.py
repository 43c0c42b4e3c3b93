"""Checkpoint layouts: how config fields and tensor names correspond to a model."""

from ._fields import Fields as Fields
from ._layout import Described as Described, Layout as Layout, Slot as Slot
from ._match import (
    check_tied_head as check_tied_head,
    group_by_leaf as group_by_leaf,
    listing as listing,
    match as match,
    quantized_paths as quantized_paths,
    rename as rename,
    rename_tensors as rename_tensors,
    renamed as renamed,
    slots as slots,
)
from ._mistral import MISTRAL as MISTRAL
from ._registry import LAYOUTS as LAYOUTS, check_storable as check_storable
from ._skeleton import (
    config_from as config_from,
    restacked as restacked,
    skeleton as skeleton,
    unrolled as unrolled,
)
from .transformers import (
    TRANSFORMERS as TRANSFORMERS,
    transformers_layout as transformers_layout,
)
