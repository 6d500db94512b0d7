"""LoRA Dropout on a finished ``PeftModel``: find its layers, make their masks, switch them on and off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from pipeline.lora_dropout.masks import feature_words, kept
from pipeline.lora_dropout.variant import LayerMasks, LoraDropoutVariant

SUPPORTED_LAYERS = (Linear, Linear4bit, Linear8bitLt)

_PEFT_PREFIX = "base_model.model."


def canonical_name(name: str) -> str:
    """A module's name in the base model, whatever wraps it: masks must not depend on the wrapper."""
    return name.rpartition(_PEFT_PREFIX)[2]


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that hold the adapter, by canonical name, sorted so that ranks agree.

    Raises:
        ValueError: the adapter is on no layer, on a kind of layer without a mask rule, or on a layer that
            already has another LoRA variant (e.g. DoRA): a layer is never left without masks in silence.
    """
    layers = {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        raise ValueError(f"no layer holds a LoRA adapter named {adapter_name!r}")
    for name, layer in layers.items():
        if not isinstance(layer, SUPPORTED_LAYERS):
            raise ValueError(f"LoRA Dropout has no masks for {type(layer).__name__} ({name})")
        if adapter_name in layer.lora_variant:
            variant = type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"{name} already has the LoRA variant {variant}; LoRA Dropout cannot be combined with it")
    return dict(sorted(layers.items()))


def feature_counts(layer: LoraLayer) -> tuple[int, int]:
    """Input and output features of the frozen layer; its weight's shape would be that of a shard under ZeRO-3."""
    assert layer.in_features is not None and layer.out_features is not None
    return layer.in_features, layer.out_features


class LoraDropout:
    """The masks of one adapter of a finished ``PeftModel``.

    Between ``with`` blocks the model runs peft's stock code, bit for bit. Inside one, each group of rows sees its
    own mask. Nothing is registered on the model: its state dict, its parameters and its saved adapter stay stock.

        dropout = LoraDropout(model, rate=0.5, seed=42)
        with dropout.masks("train", [(step, micro_batch, n) for n in range(4)]):
            loss = model(**four_copies_of_the_batch).loss
            loss.backward()

    With ``rescale`` (the default of the recipe) masks are scaled by 1/(1-p), so that the mean of ``B_hat A_hat`` is
    ``BA``. Equation 2 verbatim, without the scale, is the same model at ``alpha * (1-p)**2``: see
    :func:`folded_alpha`.
    """

    def __init__(self, model: PeftModel, rate: float, seed: int, adapter_name: str = "default") -> None:
        """Find the layers; nothing changes yet.

        Args:
            model: with the adapter already on it.
            rate: p in [0, 1).
            seed: of the masks.
            adapter_name: peft's name of the adapter.

        Raises:
            ValueError: see :func:`lora_layers`, or a rate outside [0, 1).
        """
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"the dropout rate is a probability below 1, found {rate}")
        self.rate = rate
        self.seed = seed
        self.adapter_name = adapter_name
        self.layers = lora_layers(model, adapter_name)
        self._words: torch.Tensor | None = None

    @contextmanager
    def masks(self, purpose: str, coordinates: Sequence[tuple[int, ...]]) -> Iterator[None]:
        """Context in which the batch's rows see ``G = len(coordinates)`` masks.

        A batch of ``G*b`` rows is group-major: rows ``[g*b, (g+1)*b)`` are under mask g. The context must enclose
        forward, recomputation and backward.

        Raises:
            RuntimeError: entered inside another one.
        """
        if any(self.adapter_name in layer.lora_variant for layer in self.layers.values()):
            raise RuntimeError("LoraDropout.masks() is already active on this adapter; leave it first")
        for name, masks in self.layer_masks(purpose, coordinates).items():
            self.layers[name].lora_variant[self.adapter_name] = LoraDropoutVariant(masks)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.lora_variant.pop(self.adapter_name, None)

    def members(self, numbers: Iterable[int]) -> AbstractContextManager[None]:
        """Masks of the ensemble members with these numbers (equation 8); rows are member-major."""
        return self.masks("ensemble", [(number,) for number in numbers])

    def layer_masks(self, purpose: str, coordinates: Sequence[tuple[int, ...]]) -> dict[str, LayerMasks]:
        """Masks of every layer at these coordinates, by canonical name."""
        scale = (1.0 - self.rate) ** -2
        bits = kept(self._feature_words(), self.seed, purpose, coordinates, self.rate)  # (G, F)
        sizes = [size for layer in self.layers.values() for size in feature_counts(layer)]
        parts = iter(bits.split(sizes, dim=1))
        return {name: LayerMasks(next(parts), next(parts), scale) for name in self.layers}

    def _feature_words(self) -> torch.Tensor:
        """``(F,)`` int64, A then B of every layer: all masks of a step come from one hash of this vector."""
        device = next(iter(self.layers.values())).lora_A[self.adapter_name].get_parameter("weight").device
        if self._words is None or self._words.device != device:
            words = []
            for name, layer in self.layers.items():
                features_in, features_out = feature_counts(layer)
                words += [feature_words(name, "A", features_in, device), feature_words(name, "B", features_out, device)]
            self._words = torch.cat(words)
        return self._words


def folded_alpha(alpha: float, rate: float, rescale: bool) -> float:
    """The alpha under which masks scaled by 1/(1-p), and the deterministic adapter, mean what the recipe says.

    ``rescale=False`` is equation 2 verbatim: masks of 0 and 1, whose mean adapter is ``(1-p)**2 BA``. Folding that
    factor into alpha once, when the adapter is created, makes every later use right: the deterministic model, the
    saved adapter in stock peft, a merge. The masked model is unchanged, since the two scales of 1/(1-p) cancel it.
    """
    return alpha if rescale else alpha * (1.0 - rate) ** 2
