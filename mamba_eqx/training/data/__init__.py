"""Batches, the order in which tokens are read, and token files."""

from ._batch import Batch as Batch
from ._documents import (
    document_starts as document_starts,
    hold_out_documents as hold_out_documents,
    hold_out_end as hold_out_end,
)
from ._orders import Packed as Packed, Streams as Streams
from ._token_files import read_tokens as read_tokens, write_tokens as write_tokens
