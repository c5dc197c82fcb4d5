"""LoRA adapters as a pytree beside the parameters: init, merge, and the PEFT file layout."""

from gemma_cot.lora.lora import TARGETS, Lora, init_lora, merge

__all__ = ["TARGETS", "Lora", "init_lora", "merge"]
