"""Encoding of text in which some parts are special tokens."""

from collections.abc import Sequence

from ._chat_template import Piece
from ._private_spelling import PrivateTokenizer
from ._rust import checked


def encode_pieces(
    private: PrivateTokenizer, pieces: Sequence[Piece], *, add_special_tokens: bool
) -> list[int]:
    """Encodes pieces of a text together, so that each has the tokens that it has in its context.

    A special token with flags (`single_word`, for example) is not recognised in every context, and
    then consists of plain characters.

    **Arguments:**

    - `private`: the tokenizer. No piece may contain its `nonce`.
    - `pieces`: the pieces of the text.
    - `add_special_tokens`: whether to add the tokens that the tokenizer adds to every text.

    **Returns:**

    The token ids.

    **Raises:** `ValueError` if `tokenizers` fails.
    """
    while True:
        spelled = [private.private[text] if special else text for text, special in pieces]
        encoding = checked(
            lambda text="".join(spelled): private.fast.encode(
                text, add_special_tokens=add_special_tokens
            ),
            "This text cannot be encoded",
        )
        spans: list[tuple[int, int, int]] = []
        start = 0
        for i, text in enumerate(spelled):
            if pieces[i].is_special:
                spans.append((i, start, start + len(text)))
            start += len(text)
        missed = _missed(spans, encoding.offsets)
        if not missed:
            return encoding.ids
        pieces = [
            Piece(piece.text, piece.is_special and i not in missed)
            for i, piece in enumerate(pieces)
        ]


def _missed(spans: Sequence[tuple[int, int, int]], offsets: Sequence[tuple[int, int]]) -> set[int]:
    """Returns the numbers of the pieces that are not covered by a single token.

    The first and the last character of a piece do not count: they may be spaces, which some
    tokenizers do not count as parts of tokens.
    """
    missed = set[int]()
    if not spans:
        return missed
    tokens = iter(offsets)
    first, last = 0, 0
    for number, start, end in spans:
        while last < end - 1:
            token = next(tokens, None)
            if token is None:
                break
            first, last = token
        if first > start + 1 or last < end - 1:
            missed.add(number)
    return missed
