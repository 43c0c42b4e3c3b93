"""Training: losses, the papers' recipe, data, and a trainer that survives."""

from ._batch import Batch as Batch
from ._lora import LoRA as LoRA, LoRAPair as LoRAPair
from ._lora_file import load_lora as load_lora, save_lora as save_lora
from ._state_tuning import begin as begin
