"""Log-likelihoods of continuations, with shared tokens computed once (mode ``fast``).

``layout.py`` says which tokens share a forward pass; this file runs the passes and reads the scores, in float32.

Legend: N members, n members of one pass, B rows, T new tokens of a row, P kept tokens before them, K last columns whose
logits are wanted, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from eval.lm.average import RunningLogprobs
from eval.lm.layout import Group, Request, Row, batches_of, groups_of, rows_of, separate_rows
from eval.lm.members import Members, passes

LEAST_SAVING = 256
"""Tokens that keeping a beginning must save: about what reading the weights for one more pass costs."""
LOGITS_BYTES = 512 * 2**20
"""Of one pass, in float32, at most (a longer single row takes what it needs)."""


@dataclass(frozen=True)
class Scored:
    """The scores of one request."""

    running: list[float]
    """``(N,)`` log-likelihood in nats under the average of the first 1..N members."""
    members: list[float]
    """``(N,)`` under each member alone."""
    greedy: bool
    least_gap: float
    """Smallest Jensen gap of any token, nats."""


class NotFinite(ArithmeticError):
    """A score is NaN or infinite."""

    def __init__(self, request: int) -> None:
        """``request``: its index."""
        self.request = request
        super().__init__(f"request {request} has a score that is not finite")


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


class Scorer:
    """Scores requests with a causal language model, over the members of an ensemble."""

    def __init__(self, model: PeftModel | PreTrainedModel, members: Members, tokens_per_pass: int) -> None:
        """Args: ``model`` in eval mode on its device; ``tokens_per_pass``: new tokens of one pass, all members
        counted."""
        self.model = model
        self.members = members
        self.tokens_per_pass = tokens_per_pass
        self.device = model.device
        self.separate = why_separate(model)
        """Why tokens cannot be shared, in words; None where they are."""
        self._additive = model.config._attn_implementation == "eager"  # it adds its mask; sdpa takes booleans
        self._most_members = members.count  # of one pass; falls when memory is short
        self._active: range | None = None
        self._mask_context = ExitStack()

    def plan(self, requests: Sequence[Request]) -> list[tuple[Group, list[list[Row]]]]:
        """All forward passes, as groups of batches; equal for equal requests."""
        tokens = max(1, self.tokens_per_pass // self.members.count)
        scored = max(1, LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size * self.members.count))
        rows = self.members.rows_per_pass or len(requests)
        groups = [Group(0, separate_rows(requests))] if self.separate else groups_of(rows_of(requests), LEAST_SAVING)
        return [(group, batches_of(group, tokens, rows, scored)) for group in groups]

    def scores(
        self, requests: Sequence[Request], finished: frozenset[int] = frozenset()
    ) -> Iterator[dict[int, Scored]]:
        """The scores of each batch, by index of the request.

        Batches are those of all requests, whichever are finished: what a request shares a batch with, and so its last
        bits, does not depend on when an evaluation was ended. A batch is skipped where all its requests are finished.

        Raises:
            NotFinite: a score is NaN or infinite.
            torch.OutOfMemoryError: one row of one member does not fit.
        """
        try:
            for group, batches in self.plan(requests):
                todo = [batch for batch in batches if not _indices(batch) <= finished]
                kept = self._kept(group) if group.prefix and todo else None
                prefix = group.prefix if kept else 0
                for batch in todo:
                    yield self._scored(batch, prefix, kept)
        finally:
            self._deactivate()

    @torch.no_grad()
    def _kept(self, group: Group) -> Kept | None:
        """The prefix in every member; None where it does not fit: rows are then run whole."""
        tokens = torch.tensor([group.rows[0].context[: group.prefix]], device=self.device)
        parts: list[Kept] = []
        try:
            for numbers in self._passes(1, group.prefix):
                cache = DynamicCache(config=self.model.config)
                self._activate(numbers)
                rows = tokens.repeat(len(numbers), 1)
                self.model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                parts.append(_states(cache))
        except torch.OutOfMemoryError:
            return None
        return [
            (torch.cat([keys for keys, _ in layers]), torch.cat([values for _, values in layers]))
            for layers in zip(*parts, strict=True)
        ]

    def _scored(self, rows: list[Row], prefix: int, kept: Kept | None) -> dict[int, Scored]:
        """The scores of a batch, in smaller passes where memory is short."""
        try:
            return self._batch_scores(rows, prefix, kept)
        except torch.OutOfMemoryError:
            if len(rows) == 1 and self._most_members == 1:
                raise
        # Outside the handler, whose traceback would keep the failed pass's tensors.
        if self._most_members > 1:
            self._most_members = -(-self._most_members // 2)
            return self._scored(rows, prefix, kept)
        half = len(rows) // 2
        return self._scored(rows[:half], prefix, kept) | self._scored(rows[half:], prefix, kept)

    @torch.no_grad()
    def _batch_scores(self, rows: list[Row], prefix: int, kept: Kept | None) -> dict[int, Scored]:
        """The scores of a batch."""
        batch = batch_of(rows, prefix, self.device, left=self.separate is not None)
        average = RunningLogprobs(self.members.average, batch.place, batch.token)
        for numbers in self._passes(len(rows), batch.tokens.shape[1]):
            logits = self._logits(batch, numbers, kept)  # (n*B, K, V)
            for member in logits.unflatten(0, (len(numbers), -1)):
                average.add(member[batch.places[:, 0], batch.places[:, 1]][None])
        return _by_request(rows, batch.owner, average)

    def _logits(self, batch: Batch, numbers: range, kept: Kept | None) -> torch.Tensor:
        """``(n*B, K, V)`` in the model's dtype, member-major."""
        self._activate(numbers)
        n = len(numbers)
        tokens = batch.tokens.repeat(n, 1)
        if self.separate:
            return self.model(input_ids=tokens).logits
        mask = None
        if batch.visible is not None:
            mask = batch.visible.repeat(n, 1, 1, 1)
            if self._additive:
                lowest = torch.finfo(self.model.dtype).min
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
        cache = None
        if kept is not None:
            members = slice(numbers.start, numbers.stop)
            cache = Cache(layers=[KeptPrefix(keys[members], values[members]) for keys, values in kept])
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=batch.positions.repeat(n, 1),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=batch.columns,
        ).logits

    def _passes(self, rows: int, tokens: int) -> list[range]:
        """Members of each pass over ``rows`` rows of ``tokens`` new tokens."""
        most = max(1, min(self._most_members, self.tokens_per_pass // (rows * tokens)))
        return [
            range(first, min(first + most, part.stop))
            for part in passes(self.members, rows)
            for first in range(part.start, part.stop, most)
        ]

    def _activate(self, numbers: range) -> None:
        """Masks of these members, kept on from pass to pass: drawing them costs as much as some tokens."""
        if numbers != self._active:
            self._deactivate()
            self._mask_context.enter_context(self.members.active(numbers))
            self._active = numbers

    def _deactivate(self) -> None:
        self._mask_context.close()
        self._active = None


def _states(cache: DynamicCache) -> Kept:
    """Keys and values of a filled cache, layer by layer."""
    states: Kept = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        states.append((layer.keys, layer.values))
    return states


def _indices(batch: Sequence[Row]) -> frozenset[int]:
    """Of all requests of a batch."""
    return frozenset(index for row in batch for asked in row.requests for index in asked)


def _by_request(rows: Sequence[Row], owner: torch.Tensor, average: RunningLogprobs) -> dict[int, Scored]:
    """Sums over each continuation's tokens, in float64, for every request that asks for it."""
    running, each = average.running.cpu().double(), average.each.cpu().double()  # (N, Q)
    asked = [requests for row in rows for requests in row.requests]
    sums = [torch.zeros(len(part), len(asked)).double().index_add_(1, owner, part) for part in (running, each)]
    gaps = torch.full((len(asked),), torch.inf, dtype=torch.double)
    gaps.scatter_reduce_(0, owner, running[-1] - each.mean(dim=0), "amin")
    greedy = torch.ones(len(asked)).scatter_reduce_(0, owner, average.greedy().cpu().float(), "amin").bool()
    found: dict[int, Scored] = {}
    for at, requests in enumerate(asked):
        if not (sums[0][:, at].isfinite().all() and sums[1][:, at].isfinite().all()):
            raise NotFinite(requests[0])
        scored = Scored(sums[0][:, at].tolist(), sums[1][:, at].tolist(), bool(greedy[at]), float(gaps[at]))
        found |= dict.fromkeys(requests, scored)
    return found


def why_separate(model: PeftModel | PreTrainedModel) -> str | None:
    """Why a model's rows must be run whole and one request each, in words; None where tokens can be shared.

    Sharing needs attention that obeys a mask of ours and positions given by us.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal, PreTrainedModel)
    config: PretrainedConfig = causal.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({config._attn_implementation}) takes no mask of branches"
    taken = inspect.signature(causal.forward).parameters
    missing = [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in taken]
    if missing:
        return f"its forward takes no {', '.join(missing)}"
    kinds = set(config.to_dict().get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"} or config.to_dict().get("sliding_window"):
        return "not all of its layers attend to everything before"
    rope = config.to_dict().get("rope_parameters") or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return f"its rotary embedding ({rope['rope_type']}) depends on the length of the sequence"
    if not _obeys(causal):
        return "its scores change when tokens are shared, in a test on random tokens"
    return None


LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@torch.no_grad()
def _obeys(causal: PreTrainedModel) -> bool:
    """Whether a row with two branches after a kept beginning gives the logits of whole rows, on random tokens.

    Catches models that ignore positions or masks, and heads that treat the kept columns differently.
    """
    vocabulary = causal.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (18,), generator=draw).tolist()
    context, branches = tuple(tokens[:12]), [tuple(tokens[12:16]), tuple(tokens[15:18])]
    row = Row(context, branches, [[0], [1]])
    batch = batch_of([row, Row(context[:-2], branches[:1], [[2]])], 6, causal.device)
    cache = DynamicCache(config=causal.config)
    start = torch.tensor([context[:6]], device=causal.device)
    causal(input_ids=start, past_key_values=cache, use_cache=True)
    kept = Cache(layers=[KeptPrefix(keys, values) for keys, values in _states(cache)])
    assert batch.visible is not None
    mask = batch.visible
    if causal.config._attn_implementation == "eager":
        lowest = torch.finfo(causal.dtype).min
        mask = torch.zeros_like(mask, dtype=causal.dtype).masked_fill_(~mask, lowest)
    shared = causal(
        input_ids=batch.tokens,
        attention_mask=mask,
        position_ids=batch.positions,
        past_key_values=kept,
        use_cache=True,
        logits_to_keep=batch.columns,
    ).logits.float()
    shared = shared[batch.places[:, 0], batch.places[:, 1]]
    wholes = [context + branches[0][:-1], context + branches[1][:-1], context[:-2] + branches[0][:-1]]
    logits = [causal(input_ids=torch.tensor([whole], device=causal.device)).logits[0].float() for whole in wholes]
    separate = torch.cat([logits[0][11:], logits[1][12:], logits[2][9:]])
    tolerance = 1e-3 if causal.dtype == torch.float32 else 0.1
    return bool((shared - separate).abs().max() <= tolerance * separate.std())
