"""Loading, saving, uploading and describing checkpoints."""

from ..formats import CheckpointError as CheckpointError
from ._arrays import check_dtype as check_dtype
from ._assign import Assignment as Assignment, assign as assign
from ._checkpoint import (
    Checkpoint as Checkpoint,
    open_checkpoint as open_checkpoint,
    read_checkpoint as read_checkpoint,
)
from ._classifier import load_classifier as load_classifier, save_classifier as save_classifier
from ._companions import TOKENIZER as TOKENIZER, read_companions as read_companions
from ._describe import Description as Description, describe as describe
from ._hub import Hub as Hub
from ._load import from_pretrained as from_pretrained, load as load
from ._push import push_to_hub as push_to_hub
from ._save import save_checkpoint as save_checkpoint, save_pretrained as save_pretrained
from ._source import (
    CONFIGS as CONFIGS,
    Source as Source,
    may_be_there as may_be_there,
    open_source as open_source,
)
from ._state_dict import (
    LAYOUTS as LAYOUTS,
    get_layout as get_layout,
    layouts_for as layouts_for,
    load_state_dict as load_state_dict,
    state_dict as state_dict,
)
from ._tokenizer import (
    load_tokenizer as load_tokenizer,
    read_tokenizer as read_tokenizer,
    save_tokenizer as save_tokenizer,
)
from .layouts import (
    Fields as Fields,
    Slot as Slot,
    config_from as config_from,
    listing as listing,
    rename as rename,
    rename_tensors as rename_tensors,
    skeleton as skeleton,
)
