"""Decoding with an ensemble over masks (equation 8 of arXiv 2404.09610).

Members are rows of one batch with their own KV caches. At every step the members' next-token scores are averaged,
logits processors (temperature, top-p, penalties) act once on the average, and one token is chosen and fed to all.

Legend: N members, n members of one pass, B requests, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from eval.lm.average import Average, RunningAverage, RunningLogprobs
from eval.lm.members import Members, passes
from pipeline.errors import UserError


@dataclass
class Step:
    """What one decoding step chose, before temperature and other processors. All float32."""

    tokens: torch.Tensor
    """``(B,)`` the chosen tokens."""
    running: torch.Tensor
    """``(N, B)`` their log-probability, in nats, under the average of the first 1..N members."""
    members: torch.Tensor
    """``(N, B)`` under each member alone."""
    total_entropy: torch.Tensor
    """``(B,)`` entropy, in nats, of the arithmetic mean of the members' distributions."""
    expected_entropy: torch.Tensor
    """``(B,)`` mean of the members' entropies."""


class _MemberRows:
    """The members' forward passes over one shared sequence of tokens, each member with its own KV cache."""

    def __init__(self, model: PreTrainedModel, members: Members, prompt_mask: torch.Tensor) -> None:
        """``prompt_mask``: ``(B, T)``, 0 on left padding."""
        self.model = model
        self.members = members
        self.groups = passes(members, len(prompt_mask))
        self.caches = [DynamicCache(config=model.config) for _ in self.groups]
        self.mask = prompt_mask
        self.padded = not bool(prompt_mask.all())  # without padding no mask is passed: attention is faster

    def next_logits(self, tokens: torch.Tensor, **forward_arguments: Any) -> torch.Tensor:
        """``(N, B, V)`` logits after the ``(B, t)`` newest tokens, in the model's dtype."""
        past = self.mask.shape[1] - tokens.shape[1]
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        logits = []
        for numbers, cache in zip(self.groups, self.caches, strict=True):
            n = len(numbers)
            # Entered again only where members are chunked: with one pass the caller holds it over the whole sequence.
            with self.members.active(numbers) if len(self.groups) > 1 else nullcontext():
                output = self.model(
                    input_ids=tokens.repeat(n, 1),
                    attention_mask=self.mask.repeat(n, 1) if self.padded else None,
                    position_ids=positions.repeat(n, 1),
                    past_key_values=cache,
                    use_cache=True,
                    **forward_arguments,
                )
            logits.append(output.logits[:, -1].unflatten(0, (n, -1)))
        return torch.cat(logits)

    def append(self, tokens: torch.Tensor) -> None:
        """Make room for ``(B,)`` chosen tokens, which are visible from now on."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)


@dataclass
class EnsembleDecoder:
    """A decoding loop for ``generate(custom_generate=...)``.

    It keeps ``generate``'s own preparation: input checks, generation config, processors and stopping criteria, which
    see the B averaged rows. Greedy search and sampling are supported.

        decoder = EnsembleDecoder(MaskedMembers(dropout, Ensemble(instances=8)))
        model.generate(**tokenizer(prompt, return_tensors="pt"), custom_generate=decoder, max_new_tokens=64)

    A streamer belongs here and not in ``generate``, which drops it for callables (transformers 5.23).
    """

    members: Members
    """Whose scores are averaged."""
    streamer: BaseStreamer | None = None
    """Receives the prompt, then each token."""
    record: bool = False
    """Keep a :class:`Step` for each token in ``steps``."""
    steps: list[Step] = field(default_factory=list)
    """Of the latest call."""

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Called by ``generate``.

        Args:
            model: the causal language model inside the ``PeftModel``.
            input_ids: ``(B, T)``, left-padded.
            logits_processor: acts on the B averaged rows.
            stopping_criteria: sees the B rows of tokens.
            generation_config: ``do_sample``, ``num_beams`` and ``pad_token_id`` are read.
            **model_kwargs: of which ``attention_mask`` ``(B, T)`` is read; None when nothing is padded.

        Returns:
            ``(B, T + new tokens)``; finished rows end in padding.

        Raises:
            UserError: beam search was asked for.
        """
        if generation_config.num_beams != 1:
            raise UserError(
                f"beam search (num_beams: {generation_config.num_beams}) is not supported with an ensemble: its beams "
                "would have to be reordered in every member; set num_beams: 1 in the task's generation_kwargs, or "
                "evaluate without the system ensemble"
            )
        self.steps = []
        prompt_mask = model_kwargs.get("attention_mask")
        rows = _MemberRows(model, self.members, torch.ones_like(input_ids) if prompt_mask is None else prompt_mask)
        with self.members.active(rows.groups[0]) if len(rows.groups) == 1 else nullcontext():
            return self._decoded(rows, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    def _decoded(
        self,
        rows: _MemberRows,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The loop itself; see ``__call__``."""
        forward_arguments = {key: model_kwargs[key] for key in ("logits_to_keep",) if key in model_kwargs}
        padding = generation_config.pad_token_id
        pads = padding is not None and any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        newest = input_ids
        while unfinished.any():
            logits = rows.next_logits(newest, **forward_arguments)
            average = RunningAverage(self.members.average)
            average.add(logits)
            # transformers asks for a LongTensor, a type that no torch function declares to return
            scores = logits_processor(input_ids, average.value())  # type: ignore[arg-type]
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
            else:
                chosen = scores.argmax(dim=-1)
            if pads:
                chosen = torch.where(unfinished, chosen, padding)
            if self.record:
                self.steps.append(_step(chosen, logits, self.members.average))
            if self.streamer is not None:
                self.streamer.put(chosen.cpu())
            newest = chosen[:, None]
            input_ids = torch.cat([input_ids, newest], dim=1)
            rows.append(chosen)
            unfinished &= ~stopping_criteria(input_ids, scores)
        if self.streamer is not None:
            self.streamer.end()
        return input_ids


def _step(chosen: torch.Tensor, logits: torch.Tensor, kind: Average) -> Step:
    """The record of one step: ``(B,)`` tokens, ``(N, B, V)`` the members' logits."""
    average = RunningLogprobs(kind, torch.arange(len(chosen), device=chosen.device), chosen)
    average.add(logits)
    members = logits.float().log_softmax(dim=-1)
    mean = members.logsumexp(dim=0) - math.log(len(members))
    return Step(
        tokens=chosen,
        running=average.running,
        members=average.each,
        total_entropy=_entropy(mean),
        expected_entropy=_entropy(members).mean(dim=0),
    )


def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """``(..., V)`` log-probabilities to ``(...)`` nats."""
    return torch.special.entr(logprobs.exp()).sum(dim=-1)
