"""The masks of one layer while they are active, and what every kind of masked layer can do."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from pipeline.lora_dropout.masks import picked, unpacked

_IN_LIST_OF_EXPERTS = re.compile(r"(^|\.)experts\.\d+\.")
"""A layer of one expert of many, in models that keep a list of them (``mlp.experts.3.up_proj``)."""


@dataclass(frozen=True)
class Runs:
    """Tokens of each group, where examples of different lengths lie in one row, one after another.

    Made once for all layers: none waits for a copy to the device, and compiled code depends on their sum alone.
    """

    lengths: tuple[int, ...]
    """G of them."""
    ends: torch.Tensor
    """``(G,)`` int32: where each group's tokens end."""
    tokens: int
    """Of all groups."""
    equal: bool
    """Whether all lengths are the same."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Runs:
        """The runs of these lengths."""
        ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32).to(device)
        return cls(tuple(lengths), ends, sum(lengths), len(set(lengths)) == 1)


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
    runs: Runs | None = None
    """Where each group's tokens are, unless all groups have the same share of the rows."""

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

    def kept_in_at(self, features: torch.Tensor) -> torch.Tensor:
        """Whether single features of A's side are kept.

        Args:
            features: integers of any shape, group-major: flattened they are G runs, of equal or the given lengths.

        Returns:
            ``(number of them,)`` bool.
        """
        features = features.reshape(-1)
        runs = self.ragged_runs(len(features))
        places = torch.arange(len(features), device=features.device)
        if runs is None:
            return picked(self.bits_in, places // (len(features) // self.groups), features)
        return picked(self.bits_in, torch.searchsorted(runs.ends, places, right=True), features)

    def check_rows(self, x: torch.Tensor) -> None:
        """Refuse an input whose rows do not belong to these groups.

        Args:
            x: ``(rows, ..., in)``; two-dimensional input may be flattened tokens, a multiple of the rows. A single row
                may be shared by the batch, where there is one mask.

        Raises:
            ValueError: names the layer.
        """
        found = x.shape[0]
        if self.runs is not None or (self.groups == 1 and found == 1):  # one row for all rows: one mask for all
            return
        shared = (
            "; what all rows share (DeBERTa's relative positions, BERT's positions) can only be under one mask: run "
            "the masks one after another (execution: sequential), or leave this layer out of target_modules"
            if found == 1
            else ""
        )
        if self.rows is not None and found != self.rows and (x.dim() != 2 or found % self.rows):
            raise ValueError(f"{self.layer}: masks for a batch of {self.rows} rows, found {found} rows{shared}")
        if found % self.groups:
            raise ValueError(
                f"{self.layer}: {self.groups} mask groups need a batch whose rows divide by {self.groups}, "
                f"found {found} rows; rows must be group-major inside LoraDropout.masks(){shared}"
            )

    def ragged_runs(self, tokens: int) -> Runs | None:
        """``runs``, or None where all groups have the same share of the tokens.

        Raises:
            ValueError: the lengths do not add up to the tokens.
        """
        if self.runs is None or self.groups == 1:
            return None
        if self.runs.tokens != tokens:
            raise ValueError(
                f"{self.layer}: masks for {self.groups} examples of together {self.runs.tokens} tokens, "
                f"found {tokens} tokens"
            )
        return None if self.runs.equal else self.runs


def refuse_merging(name: str) -> NoReturn:
    """A merge under masks would not be the one that a later ``unmerge_adapter()`` takes back: the base would change."""
    raise RuntimeError(f"{name}: cannot be merged while masks are active; leave LoraDropout.masks() first")


class MaskedVariant(LoraVariant):
    """Attached to a layer only while masks are active; detached, peft's stock code runs.

    peft declares static methods and calls them on the instance.
    """

    def __init__(self, masks: LayerMasks) -> None:
        self.masks = masks

    def merge_safe(self, *args: object) -> NoReturn:  # type: ignore[override]
        """Refused."""
        refuse_merging(self.masks.layer)

    def merge_unsafe(self, *args: object) -> NoReturn:  # type: ignore[override]
        """Refused; peft's own does nothing and counts the adapter as merged."""
        refuse_merging(self.masks.layer)


class MaskedLayer(ABC):
    """A layer that holds the adapter, of one kind: how many features it masks, and how."""

    one_group = ""
    """Why the whole batch must share one mask; empty where it need not."""

    def __init__(self, name: str, layer: LoraLayer, adapter_name: str) -> None:
        """Remember the layer; nothing changes yet.

        Args:
            name: canonical.
            layer: peft's.
            adapter_name: peft's name of the adapter.
        """
        self.name = name
        self.layer = layer
        self.adapter_name = adapter_name
        if _IN_LIST_OF_EXPERTS.search(name):
            self.one_group = "an expert sees only the tokens sent to it and cannot know which rows they are from"

    def features(self) -> tuple[int, int]:
        """Features masked on A's side and on B's, by the layer's own record: its weight may be a shard under ZeRO-3."""
        assert self.layer.in_features is not None and self.layer.out_features is not None
        return self.layer.in_features, self.layer.out_features

    def device(self) -> torch.device:
        """Of the adapter's weights, where the masks must be."""
        return self.layer.lora_A[self.adapter_name].get_parameter("weight").device

    def occupied(self) -> bool:
        """Whether something is in the place of the masked pass: another handle's masks, or another variant."""
        return self.adapter_name in self.layer.lora_variant

    @abstractmethod
    def attach(self, masks: LayerMasks) -> None:
        """Put the masked pass in place of peft's."""

    @abstractmethod
    def detach(self) -> None:
        """peft's own code runs again, bit for bit."""

    @abstractmethod
    def member_weights(self, masks: LayerMasks) -> dict[str, torch.Tensor]:
        """The first group's masked adapter as weights of a plain LoRA, in float32, by the name peft gives them in the
        layer: to be used at the layer's own ``scaling``, except where a kind says otherwise."""
