"""Checkpoints: loading, saving, pushing and describing them."""

from ..formats import CheckpointError as CheckpointError
from ._arrays import check_dtype as check_dtype
from ._checkpoint import (
    find_files as find_files,
    open_checkpoint as open_checkpoint,
    read_checkpoint as read_checkpoint,
)
from ._describe import Description as Description, describe as describe
from ._hub import Hub as Hub
from ._load import from_pretrained as from_pretrained, load as load
from ._push import push_to_hub as push_to_hub
from ._save import save_pretrained as save_pretrained
from ._state_dict import (
    LAYOUTS as LAYOUTS,
    layout_named as layout_named,
    load_state_dict as load_state_dict,
    state_dict as state_dict,
)
from ._tokenizer import (
    TOKENIZER_FILES as TOKENIZER_FILES,
    load_tokenizer as load_tokenizer,
    read_tokenizer as read_tokenizer,
    save_tokenizer as save_tokenizer,
)
from .layouts import (
    Fields as Fields,
    Slot as Slot,
    config_from as config_from,
    group_by_leaf as group_by_leaf,
    listing as listing,
    skeleton as skeleton,
    slots as slots,
)
