"""LoRA Dropout by itself: masks, the masked layer, the objective, and the handle that switches masks on and off.

Needs torch, peft and bitsandbytes; nothing in this folder knows recipes, trl or DeepSpeed.
"""

from pipeline.lora_dropout.attach import LoraDropout, folded_alpha
from pipeline.lora_dropout.objective import copied_rows, example_coordinates, instance_coordinates

__all__ = ["LoraDropout", "copied_rows", "example_coordinates", "folded_alpha", "instance_coordinates"]
