"""A training step in PyTorch."""

from collections.abc import Callable

import numpy as np
import torch

from ._serve import Task


def gradients(
    model: torch.nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    embedding: torch.Tensor,
    tokens: np.ndarray,
) -> Task:
    """Returns a task that computes the loss, and leaves the gradients of all weights in `model`."""
    given = torch.from_numpy(tokens)

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(
            logits(given)[:, :-1].flatten(0, 1).float(), given[:, 1:].flatten()
        )
        loss.backward()
        return loss.detach()

    def read(loss: torch.Tensor) -> dict[str, np.ndarray]:
        assert embedding.grad is not None
        return {"loss": loss.numpy(), "gradient": embedding.grad.float().numpy()}

    return Task(run, read)
