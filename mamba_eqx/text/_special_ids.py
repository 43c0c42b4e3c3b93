"""The ids of special tokens that the files of a checkpoint declare."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids of the tokens that begin, end and pad a text, as the files of a checkpoint declare
    them.

    transformers declares ids in `generation_config.json` and `config.json`, and names tokens in the
    files of the tokenizer. Where they differ, text ends at each of the declared tokens.

    **Arguments:**

    - `bos`: the id of the token that begins a text, or `None`.
    - `eos`: the ids of the tokens that end a text: none, one or several.
    - `pad`: the id of the token that pads a batch, or `None`.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def completed(self, bos: int | None, eos: Iterable[int], pad: int | None) -> "SpecialIds":
        """Returns these ids, completed by those that another file declares.

        **Arguments:**

        - `bos`, `pad`: the other file's ids, which fill what is `None` here.
        - `eos`: the other file's end tokens, which follow those of `self`.

        **Returns:**

        The completed ids. No end token occurs twice.
        """
        return SpecialIds(
            bos if self.bos is None else self.bos,
            tuple(dict.fromkeys((*self.eos, *eos))),
            pad if self.pad is None else self.pad,
        )
