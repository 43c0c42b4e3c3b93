"""Tokenizers, chat templates and stop strings."""

from ._bytes import ByteDecoder as ByteDecoder, ByteTokenizer as ByteTokenizer
from ._protocols import Decoder as Decoder, Tokenizer as Tokenizer
from ._special_ids import SpecialIds as SpecialIds
from ._stop_strings import (
    StopFilter as StopFilter,
    stop_table as stop_table,
    text_until as text_until,
)
from ._text_decoder import TextDecoder as TextDecoder
from ._text_tokenizer import TextTokenizer as TextTokenizer, chat_tokenizer as chat_tokenizer


# The public names. Other folders of the package may import the other names too.
__all__ = [
    "ByteDecoder",
    "ByteTokenizer",
    "Decoder",
    "SpecialIds",
    "TextDecoder",
    "TextTokenizer",
    "Tokenizer",
]
