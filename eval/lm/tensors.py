"""The tensors of one forward pass: rows of tokens with branches, the mask they obey, and a kept beginning.

Legend: n members of one pass, B rows, T new tokens of a row, P kept tokens before them, K last columns whose logits are
wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from eval.lm.layout import Row


class KeptPrefix(CacheLayerMixin):
    """One layer's keys and values of a shared beginning, read by every row of a batch; nothing is added to them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Both ``(n, heads, P, head size)``, a row per member."""
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Done."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n*B, heads, T, head size)`` new states to ``(n*B, heads, P + T, head size)``."""
        assert self.keys is not None and self.values is not None
        rows = len(key_states) // len(self.keys)
        keys, values = self.keys.repeat_interleave(rows, dim=0), self.values.repeat_interleave(rows, dim=0)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """P."""
        assert self.keys is not None
        return self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """P + T, from position 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None."""
        return -1


Kept = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, ``(N, heads, P, head size)``."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Right-aligned: the last columns are then the ones whose logits are wanted."""

    tokens: torch.Tensor
    """``(B, T)`` int64, 0 on padding."""
    positions: torch.Tensor
    """``(B, T)`` int64, in the request's own sequence."""
    visible: torch.Tensor | None
    """``(B, 1, T, P + T)`` bool; None where plain causal attention is meant."""
    columns: int
    """K."""
    places: torch.Tensor
    """``(R, 2)`` int64: row and column, among the last K, of every place where a token is predicted."""
    place: torch.Tensor
    """``(Q,)`` int64: the place, among R, of every predicted token."""
    token: torch.Tensor
    """``(Q,)`` int64: the token."""
    owner: torch.Tensor
    """``(Q,)`` int64: its continuation, counted over the rows."""


def batch_of(rows: Sequence[Row], prefix: int, device: torch.device, left: bool = False) -> Batch:
    """Rows without their first ``prefix`` tokens; ``left``: left-aligned, for models that count positions by place."""
    width = max(row.new_tokens(prefix) for row in rows)
    columns = width if left else max(1 + row.branch_tokens for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)  # padding; 0 is the context, the branches count from 1
    places: list[tuple[int, int]] = []
    place: list[int] = []
    token: list[int] = []
    owner: list[int] = []
    continuations = 0
    for number, row in enumerate(rows):
        new = row.context[prefix:]
        start = 0 if left else width - row.new_tokens(prefix)
        at = start + len(new)
        tokens[number, start:at] = torch.tensor(new)
        positions[number, start:at] = torch.arange(prefix, len(row.context))
        segments[number, start:at] = 0
        last_of_context = len(places)
        places.append((number, at - 1 - (width - columns)))
        for branch, continuation in enumerate(row.continuations, start=1):
            place.append(last_of_context)
            end = at + len(continuation) - 1
            if end > at:
                tokens[number, at:end] = torch.tensor(continuation[:-1])
                positions[number, at:end] = torch.arange(len(row.context), len(row.context) + end - at)
                segments[number, at:end] = branch
                place += range(len(places), len(places) + end - at)
                places += [(number, column - (width - columns)) for column in range(at, end)]
            at = end
            token += continuation
            owner += [continuations] * len(continuation)
            continuations += 1
    plain = prefix == 0 and bool((segments >= 0).all()) and bool((segments <= 1).all())
    return Batch(
        tokens.to(device),
        positions.to(device),
        None if plain else visible_tokens(segments, prefix).to(device),
        columns,
        torch.tensor(places, device=device),
        torch.tensor(place, device=device),
        torch.tensor(token, device=device),
        torch.tensor(owner),
    )


def visible_tokens(segments: torch.Tensor, prefix: int) -> torch.Tensor:
    """``(B, 1, T, P + T)`` bool from ``(B, T)`` segments: the prefix, the context, and one's own branch so far.

    Padding sees padding: a row of the softmax that is empty would be NaN.
    """
    rows, width = segments.shape
    before = torch.ones(width, width, dtype=torch.bool).tril()
    queries, keys = segments[:, :, None], segments[:, None, :]
    new = ((keys == 0) | (keys == queries)) & before
    return torch.cat([torch.ones(rows, width, prefix, dtype=torch.bool), new], dim=-1)[:, None]


def mask_of(batch: Batch, members: int, model: PeftModel | PreTrainedModel) -> torch.Tensor | None:
    """``(n*B, 1, T, P + T)`` as the model's attention takes it; None where plain causal attention is meant."""
    if batch.visible is None:
        return None
    mask = batch.visible.repeat(members, 1, 1, 1)
    if model.config._attn_implementation != "eager":
        return mask
    lowest = torch.finfo(model.dtype).min  # eager attention adds its mask; sdpa takes booleans
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, lowest)


def states(cache: DynamicCache) -> Kept:
    """Keys and values of a filled cache, layer by layer."""
    states: Kept = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        states.append((layer.keys, layer.values))
    return states
