"""transformers on PyTorch. Without CUDA kernels it runs its own path: a Python loop over time for
Mamba-1, chunks of 256 tokens for Mamba-2."""

from typing import Any

import numpy as np
import torch
import transformers

from ._serve import Contestant, Request, Task, serve
from ._torch import gradients


class Transformers(Contestant):
    """A causal language model with its own `generate`."""

    def __init__(self, request: Request):
        torch.set_num_threads(request.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(request.folder, dtype=getattr(torch, request.form)).eval()
        self.weight_bytes = sum(t.nbytes for t in self._model.parameters())

    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """See `Contestant.prefill`."""
        given = torch.from_numpy(tokens[None])

        def run() -> torch.Tensor:
            with torch.inference_mode():
                keep = 0 if all_logits else 1
                return self._model(given, use_cache=False, logits_to_keep=keep).logits[0]

        return Task(run, lambda y: {"logits": y.float().numpy()})

    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """See `Contestant.decode`."""
        given = torch.from_numpy(prompts)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return self._model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=None,
                    pad_token_id=0,
                )[:, 1:]

        return Task(run, lambda y: {"tokens": y.numpy()})

    def train(self, tokens: np.ndarray) -> Task:
        """See `Contestant.train`."""
        return gradients(
            self._model,
            lambda t: self._model(t, use_cache=False).logits,
            self._model.get_input_embeddings().weight,
            tokens,
        )


if __name__ == "__main__":
    serve(Transformers, ("transformers", "torch"))
