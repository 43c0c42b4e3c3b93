"""Parameter-efficient fine-tuning: LoRA, and its files in the format of PEFT."""

from ._lora import LoRA as LoRA, LoRAPair as LoRAPair
from ._peft_files import load_lora as load_lora, save_lora as save_lora
