"""The masks of one layer while they are active, and what every kind of masked layer can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from pipeline.lora_dropout.masks import unpacked


@dataclass(frozen=True)
class LayerMasks:
    """Masks of one layer for G groups of rows. Held by reference and outside ``nn.Module`` state: DDP would broadcast
    a buffer."""

    layer: str
    """Canonical name, for messages."""
    bits_in: torch.Tensor
    """``(G, padded(in) / 8)`` uint8."""
    bits_out: torch.Tensor
    """``(G, padded(out) / 8)`` uint8."""
    features_in: int
    features_out: int
    rate: float
    """p."""
    rows: int | None = None
    """Rows of the batch, where the caller said; otherwise any that G divides."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each group, where examples of different lengths lie in one row, one after another."""

    @property
    def groups(self) -> int:
        """G."""
        return self.bits_in.shape[0]

    @property
    def scale(self) -> float:
        """1 / (1-p)**2, of both masks together."""
        return (1.0 - self.rate) ** -2

    @property
    def kept_in(self) -> torch.Tensor:
        """``(G, in)`` bool, the kept columns of A."""
        return unpacked(self.bits_in, self.features_in)

    @property
    def kept_out(self) -> torch.Tensor:
        """``(G, out)`` bool, the kept rows of B."""
        return unpacked(self.bits_out, self.features_out)

    def check_rows(self, x: torch.Tensor) -> None:
        """Refuse an input whose rows do not belong to these groups.

        Args:
            x: ``(rows, ..., in)``; two-dimensional input may be flattened tokens, a multiple of the rows.

        Raises:
            ValueError: names the layer.
        """
        found = x.shape[0]
        if self.rows is not None and self.lengths is None:
            right = found == self.rows or (x.dim() == 2 and found % self.rows == 0)
            if not right:
                raise ValueError(f"{self.layer}: masks for a batch of {self.rows} rows, found {found} rows")
        if self.lengths is None and found % self.groups:
            raise ValueError(
                f"{self.layer}: {self.groups} mask groups need a batch whose rows divide by {self.groups}, "
                f"found {found} rows; rows must be group-major inside LoraDropout.masks()"
            )

    def packed_lengths(self, tokens: int) -> tuple[int, ...] | None:
        """``lengths``, or None where all groups have the same share of the tokens.

        Raises:
            ValueError: the lengths do not add up to the tokens.
        """
        if self.lengths is None:
            return None
        if sum(self.lengths) != tokens:
            raise ValueError(
                f"{self.layer}: masks for {len(self.lengths)} examples of together {sum(self.lengths)} tokens, "
                f"found {tokens} tokens"
            )
        return None if len(set(self.lengths)) == 1 else self.lengths


class MaskedLayer(ABC):
    """A layer that holds the adapter, of one kind: how many features it masks, and how."""

    one_group = False
    """Whether the whole batch must share one mask, because the layer's weight is one tensor for all rows."""

    def __init__(self, name: str, layer: BaseTunerLayer, adapter_name: str) -> None:
        """Remember the layer; nothing changes yet.

        Args:
            name: canonical.
            layer: peft's.
            adapter_name: peft's name of the adapter.
        """
        self.name = name
        self.layer = layer
        self.adapter_name = adapter_name

    @abstractmethod
    def features(self) -> tuple[int, int]:
        """Features masked on A's side and on B's."""

    @abstractmethod
    def device(self) -> torch.device:
        """Of the adapter's weights, where the masks must be."""

    @abstractmethod
    def attach(self, masks: LayerMasks) -> None:
        """Put the masked pass in place of peft's."""

    @abstractmethod
    def detach(self) -> None:
        """peft's own code runs again, bit for bit."""

    @abstractmethod
    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """The first group's masked adapter as weights of a plain adapter, in float32, by the kind of weight."""
