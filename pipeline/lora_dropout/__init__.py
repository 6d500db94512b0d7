"""LoRA Dropout by itself: masks, the masked layers, the objective, and the handle that switches masks on and off.

Needs torch and peft, and bitsandbytes only for layers of 4 or 8 bits. Nothing in this folder knows recipes, trl or
DeepSpeed. Source: Lin et al., arXiv 2404.09610.

- :class:`LoraDropout`: the masks of one adapter of a finished ``PeftModel``; start here.
- :func:`instance_coordinates`, :func:`example_coordinates`, :func:`copied_rows`: equation 7 in its two sampling modes.
- :func:`folded_alpha`: the alpha at which masks of 0 and 1 (``rescale: false``) have the mean that is meant.
- :class:`Rates`: the rate of each layer, by a pattern of names or growing over training.
- :class:`LayerMasks`: what :meth:`LoraDropout.layer_masks` returns for each layer.
"""

from pipeline.lora_dropout.attach import LoraDropout, folded_alpha
from pipeline.lora_dropout.layer_masks import LayerMasks
from pipeline.lora_dropout.objective import copied_rows, example_coordinates, instance_coordinates
from pipeline.lora_dropout.rates import Rates

__all__ = [
    "LayerMasks",
    "LoraDropout",
    "Rates",
    "copied_rows",
    "example_coordinates",
    "folded_alpha",
    "instance_coordinates",
]
