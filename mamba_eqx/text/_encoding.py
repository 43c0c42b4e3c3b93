"""Encoding of text in which some parts are special tokens."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._chat_template import Piece
from ._private_spelling import PrivateTokenizer
from ._rust import checked


if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer as Fast


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
    encode = functools.partial(private.fast.encode, add_special_tokens=add_special_tokens)
    while True:
        spelled = [private.private[text] if special else text for text, special in pieces]
        text = "".join(spelled)
        encoding = checked(functools.partial(encode, text), "This text cannot be encoded")
        missed = _missed(pieces, spelled, encoding, private.fast)
        if not missed:
            return encoding.ids
        pieces = [
            Piece(piece.text, piece.is_special and i not in missed)
            for i, piece in enumerate(pieces)
        ]


def _missed(
    pieces: Sequence[Piece], spelled: Sequence[str], encoding: "Encoding", fast: "Fast"
) -> set[int]:
    """Returns the numbers of the special pieces that are not covered by their token.

    The first and the last character of a piece do not count: they may be spaces, which some
    tokenizers do not count as parts of tokens.
    """
    missed = set[int]()
    if not any(piece.is_special for piece in pieces):
        return missed
    tokens = iter(zip(encoding.ids, encoding.offsets, strict=True))
    number, first, last = -1, 0, 0
    end = 0
    for i, part in enumerate(spelled):
        start, end = end, end + len(part)
        if not pieces[i].is_special:
            continue
        while last < end - 1:
            token = next(tokens, None)
            if token is None:
                break
            number, (first, last) = token
        covered = first <= start + 1 and last >= end - 1
        if not covered or number != fast.token_to_id(part):
            missed.add(i)
    return missed
