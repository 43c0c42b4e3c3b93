"""mamba.py on PyTorch: its parallel scan, and its step when decoding.

The embedding, the final norm and the head are defined here, because `mambapy.lm` cannot be imported
without mamba_ssm.
"""

import importlib
from typing import Any

import numpy as np
import torch

from ._serve import Contestant, Request, Task, config, serve, tensors
from ._torch import gradients


class MambaPy(Contestant):
    """A model of mamba.py's blocks."""

    def __init__(self, request: Request):
        torch.set_num_threads(request.threads)
        self._model = _load(config(request.folder), tensors(request.folder))
        self.weight_bytes = sum(t.nbytes for t in self._model.parameters())

    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """See `Contestant.prefill`."""
        if not all_logits:
            raise NotImplementedError("mamba.py computes all logits")
        given = torch.from_numpy(tokens[None])

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return self._model(given)[0]

        return Task(run, lambda y: {"logits": y.numpy()})

    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """See `Contestant.decode`."""
        given = torch.from_numpy(prompts)

        def run() -> torch.Tensor:
            token, caches, tokens = given[:, 0], self._model.empty(len(given)), []
            with torch.inference_mode():
                for _ in range(new):
                    logits, caches = self._model.step(token, caches)
                    token = logits.argmax(dim=-1)
                    tokens.append(token)
            return torch.stack(tokens, dim=1)

        return Task(run, lambda y: {"tokens": y.numpy()})

    def train(self, tokens: np.ndarray) -> Task:
        """See `Contestant.train`."""
        return gradients(self._model, self._model, self._model.embeddings.weight, tokens)


def _load(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    mambapy = importlib.import_module("mambapy.mamba")
    options = mambapy.MambaConfig(
        d_model=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        dt_rank=values["time_step_rank"],
        d_state=values["state_size"],
        d_conv=values["conv_kernel"],
    )

    class LanguageModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = torch.nn.Embedding(values["vocab_size"], options.d_model)
            self.layers = mambapy.Mamba(options)
            self.norm_f = mambapy.RMSNorm(options.d_model, options.rms_norm_eps, False)

        def forward(self, tokens: Any) -> Any:
            x = self.norm_f(self.layers(self.embeddings(tokens)))
            return x @ self.embeddings.weight.T

        def step(self, token: Any, caches: Any) -> tuple[Any, Any]:
            x, caches = self.layers.step(self.embeddings(token), caches)
            return self.norm_f(x) @ self.embeddings.weight.T, caches

        def empty(self, batch: int) -> list[tuple[None, Any]]:
            inputs = torch.zeros(batch, options.d_inner, options.d_conv - 1)
            return [(None, inputs) for _ in range(options.n_layers)]

    # The head is the embedding, and transformers' names differ from mamba.py's by a prefix only.
    model = LanguageModel()
    model.load_state_dict(
        {
            name.removeprefix("backbone.").replace("layers.", "layers.layers.", 1): torch.tensor(t)
            for name, t in arrays.items()
            if not name.startswith("lm_head")
        }
    )
    return model.eval()


if __name__ == "__main__":
    serve(MambaPy, ("mambapy", "torch"))
