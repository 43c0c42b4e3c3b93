"""The trained model that is bundled with the package."""

from pathlib import Path


SHIPPED: Path = Path(__file__).parent / "shakespeare"
"""The folder of the bundled model, a byte-level Mamba-1. Load it with
[`mamba_eqx.from_pretrained`][]."""
