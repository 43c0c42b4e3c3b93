"""Reading PyTorch's `.bin` and `.pth` files without torch and without running pickled code."""

from ._state_dict import open_torch as open_torch
