"""Masks for layers of peft that know no ``LoraVariant``: while masks are active, the layer's class is another one."""

from __future__ import annotations

from typing import ClassVar

from peft.tuners.lora.layer import LoraLayer

from pipeline.lora_dropout.layer_masks import LayerMasks, MaskedLayer


class SwappedLayer(MaskedLayer):
    """A layer whose class gives way to a subclass of it, which reads ``masks`` by adapter name.

    The masks lie in the instance's ``__dict__``, not in ``nn.Module`` state.
    """

    layer: LoraLayer
    classes: ClassVar[dict[type, type]]
    """peft's class -> its subclass with masks."""

    def occupied(self) -> bool:
        """Whether masks of the adapter are on."""
        return self.adapter_name in self.layer.__dict__.get("masks", {})

    def attach(self, masks: LayerMasks) -> None:
        """Swap the class, unless another adapter's masks already did."""
        if type(self.layer) in self.classes:
            self.layer.__class__ = self.classes[type(self.layer)]
            self.layer.__dict__["masks"] = {}
        self.layer.__dict__["masks"][self.adapter_name] = masks

    def detach(self) -> None:
        """peft's class again, once no adapter has masks."""
        for stock, masked in self.classes.items():
            if type(self.layer) is masked:
                masks = self.layer.__dict__["masks"]
                masks.pop(self.adapter_name, None)
                if not masks:
                    del self.layer.__dict__["masks"]
                    self.layer.__class__ = stock
