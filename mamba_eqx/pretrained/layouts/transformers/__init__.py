"""The layout of Hugging Face transformers, one file per family of models."""

from ._registry import TRANSFORMERS as TRANSFORMERS
