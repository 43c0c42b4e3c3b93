"""Checkpoint layouts: how config fields and tensor names map to a model."""

from ._fields import Fields as Fields
from ._layout import (
    Described as Described,
    Layout as Layout,
    Slot as Slot,
    by_leaf as by_leaf,
    config_of as config_of,
    listing as listing,
    match as match,
    renamed as renamed,
    restacked as restacked,
    skeleton_of as skeleton_of,
    slots as slots,
    unrolled as unrolled,
)
from ._mistral import MISTRAL as MISTRAL
from ._state_spaces import STATE_SPACES as STATE_SPACES
from ._tied_head import check_tied_head as check_tied_head
from .transformers import TRANSFORMERS as TRANSFORMERS
