"""File formats of checkpoints: reading and writing named tensors and JSON, without any model."""

from ._files import (
    is_plain_name as is_plain_name,
    open_regular as open_regular,
    read_bytes as read_bytes,
)
from ._json import (
    decode_numbers as decode_numbers,
    join_keys as join_keys,
    quote_value as quote_value,
    read_config as read_config,
    read_json as read_json,
    read_object as read_object,
)
from ._safetensors import (
    open_safetensors as open_safetensors,
    write_safetensors as write_safetensors,
)
from ._tensors import (
    CheckpointError as CheckpointError,
    StoredTensor as StoredTensor,
    quote as quote,
)
from .torch import open_torch as open_torch
