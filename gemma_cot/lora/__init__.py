"""LoRA adapters as a pytree beside the parameters: init, merge, and the PEFT file layout."""

from gemma_cot.lora.lora import TARGETS, Lora, init_lora, merge
from gemma_cot.lora.peft import load_peft, save_peft

__all__ = ["TARGETS", "Lora", "init_lora", "load_peft", "merge", "save_peft"]
