"""The layout of Hugging Face transformers, with one file per family of models."""

from ._registry import (
    TRANSFORMERS as TRANSFORMERS,
    transformers_layout as transformers_layout,
)
