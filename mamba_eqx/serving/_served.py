"""The model that a server offers, and the limits of its requests."""

import dataclasses

from ..generation import Sampling
from ..models import LanguageModel
from ..text import ByteTokenizer, TextTokenizer
from ._errors import invalid


@dataclasses.dataclass(frozen=True)
class Served:
    """A model with its tokenizer, its name, and the limits of requests.

    - `model`, `tokenizer`: the model.
    - `name`: the name by which clients ask for it.
    - `slots`, `queue`, `max_len`, `prefix_bytes`: as for [`mamba_eqx.Engine`][].
    - `seconds`: the maximum time of a request.
    - `created`: the time when the server began, in seconds since 1970.
    """

    model: LanguageModel
    tokenizer: TextTokenizer | ByteTokenizer
    name: str
    slots: int = 8
    queue: int = 64
    max_len: int = 4096
    prefix_bytes: int = 2**28
    seconds: float = 600.0
    created: int = 0

    @property
    def has_template(self) -> bool:
        """Whether the model can answer conversations."""
        return isinstance(self.tokenizer, TextTokenizer) and self.tokenizer.has_template

    def sampling(self) -> Sampling:
        """Returns the options that every text of this model has."""
        return Sampling().for_model(self.model, self.tokenizer)

    def encode(self, text: str, *, piece: bool = False, param: str = "prompt") -> list[int]:
        """Encodes a prompt, or with `piece` a text that continues an earlier one."""
        if piece and isinstance(self.tokenizer, TextTokenizer):
            ids = self.tokenizer.encode_piece(text)
        else:
            ids = self.tokenizer.encode(text)
        if not ids and not piece:
            raise invalid(f"The tokenizer finds no tokens in `{param}`. Give a longer text.", param)
        return self.check_tokens(ids, param)

    def check_tokens(self, ids: list[int], param: str) -> list[int]:
        """Refuses token ids that the model lacks."""
        if max(ids, default=0) >= self.model.vocab_size:
            raise invalid(
                f"`{param}` has a token that the model lacks. Write it differently.", param
            )
        return ids
