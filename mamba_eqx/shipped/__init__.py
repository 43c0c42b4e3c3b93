"""The trained model that ships with the package."""

from pathlib import Path


SHIPPED: Path = Path(__file__).parent / "shakespeare"
"""The folder of the byte-level Mamba-1 that ships with the package, a checkpoint to load with
[`mamba_eqx.from_pretrained`][]."""
