"""lm-eval's Hugging Face model, as one model or as an ensemble.

Mode ``exact`` runs lm-eval's own code: without an ensemble bit for bit, with one through its average of the members.
Mode ``fast`` runs ours: tokens that requests share are computed once (``score.py``), batches are cut by tokens, scores
are float32, and every request leaves a record from which the curve over 1..N members is drawn.

Legend: N members, n members of one pass, B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from peft import PeftModel
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from eval.lm.average import RunningAverage
from eval.lm.batches import (
    TokenRequest,
    batch_keys,
    generation_batches,
    generation_keys,
    sampled,
    stock_batches,
    stock_record,
)
from eval.lm.decode import EnsembleDecoder
from eval.lm.faults import FiniteScores, NotFinite, TooLong, check_finite, not_finite, too_long
from eval.lm.generated import generated_record
from eval.lm.layout import truncated
from eval.lm.members import Members, OneModel, passes
from eval.lm.records import GeneratedRecord, RequestRecord, ScoredRecord
from eval.lm.score import Scorer
from eval.lm.sharing import shared_answers
from eval.lm.store import AnswerStore, request_key
from eval.logs import progress_bar, quiet
from pipeline.errors import UserError

TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}
"""Enough for the matrix products to be efficient; more only takes memory."""

CPU_BATCH_SIZE = 8
"""What ``auto`` means for generation in mode fast on a CPU."""


class EnsembleLM(HFLM):
    """An adapter on its base, evaluated by lm-eval with or without an ensemble.

        lm = EnsembleLM(model, tokenizer, batch_size=8)                      # deterministic: stock HFLM
        masks = MaskedMembers(LoraDropout(model, 0.5, 42), Ensemble())
        lm = EnsembleLM(model, tokenizer, batch_size=8, members=masks, mode="fast")
        lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

    Several processes each hold a whole model and call the same methods with the same requests: every process answers
    its share, and all get all answers.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | Literal["auto"],
        members: Members | None = None,
        mode: Literal["exact", "fast"] = "exact",
        tokens_per_pass: int | None = None,
        store: AnswerStore | None = None,
        training_prompt: Callable[[str], str] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Wrap; nothing is loaded.

        Args:
            model: in eval mode, on its device.
            tokenizer: adds BOS by itself where training did.
            batch_size: requests per forward pass, before members multiply them; in mode fast, of generation only.
                ``auto``: the most that fit, members counted.
            members: whose scores are averaged; none: the model as it is.
            mode: see above.
            tokens_per_pass: new tokens of one pass of mode fast, all members counted; none: as fits the device.
            store: of finished answers; none keeps none.
            training_prompt: from an instruction to the prompt the adapter was trained on. lm-eval asks for it as the
                chat template, with ``apply_chat_template=True``.
            group: processes that share the requests, on a CPU backend; none: this one answers all.
        """
        self.members: Members = members or OneModel()
        if self.members.rows_per_pass is not None and batch_size != "auto":
            batch_size = min(batch_size, self.members.rows_per_pass)
        with quiet("lm_eval.models.huggingface"):  # warns that a model object skips its own multi-process setup
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.mode = mode
        self.store = store
        self.training_prompt = training_prompt
        self.group = group
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS.get(self.device.type, 4096)
        self._scorer: Scorer | None = None
        self._latest: list[ScoredRecord] = []
        self.records: dict[tuple[str | None, int | None, int], RequestRecord] = {}
        """By task, document and index of the request; of mode fast only. Of a repeated request: its first answer."""
        self.requests = 0
        """Answered so far, by all processes."""
        self.kept = 0
        """Of them, by this process, those whose answer was on disk."""
        self.seconds = 0.0
        """Spent on them, without lm-eval's own preparation and scoring."""

    # What lm-eval calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request: log-likelihood of the continuation, and whether it is the greedy one."""
        return self._answered(self._loglikelihoods, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Per request: log-likelihood of the whole text."""
        return self._answered(self._rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Per request: the text generated after the prompt.

        Raises:
            UserError: a task asks for more new tokens than the base's context holds.
        """
        for request in requests:
            tokens = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if tokens >= self.max_length:
                raise UserError(
                    f"task {request.task_name}: asks for {tokens} new tokens, but the base's context is "
                    f"{self.max_length}; set a smaller max_gen_toks in the task's generation_kwargs"
                )
        return self._answered(self._generated, requests, disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The task's whole prompt (description, examples, question) as instruction in the training prompt."""
        if self.training_prompt is None:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        instruction = "".join(message["content"] for message in chat_history if message["role"] != "assistant")
        begun = "".join(message["content"] for message in chat_history if message["role"] == "assistant")
        return self.training_prompt(instruction) + begun

    def _answered(
        self,
        answers: Callable[[list[Instance], bool], Sequence[tuple[Any, RequestRecord | None]]],
        requests: list[Instance],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answers of all processes; their records are noted."""
        started = time.perf_counter()
        found = shared_answers(answers, requests, disable_tqdm, self.group)
        self.seconds += time.perf_counter() - started
        self.requests += len(requests)
        records: dict[tuple[str | None, int | None, int], RequestRecord] = {}
        for request, (_, record) in zip(requests, found, strict=True):
            if record is not None:  # of repeats the first is the text that samples show first
                records.setdefault((request.task_name, request.doc_id, request.idx), record)
        self.records |= records
        return [answer for answer, _ in found]

    # Log-likelihoods

    def _loglikelihoods(
        self, requests: list[Instance], disable_tqdm: bool
    ) -> list[tuple[tuple[float, bool], ScoredRecord | None]]:
        """lm-eval splits the texts into tokens, then calls ``_loglikelihood_tokens``."""
        try:
            answers = super().loglikelihood(requests, disable_tqdm)
        except NotFinite as error:
            raise not_finite(requests[error.request]) from error
        except TooLong as error:
            raise too_long(requests[error.request], error.tokens, self.max_length) from error
        check_finite(requests, [score for score, _ in answers])
        if self.mode == "exact" and not isinstance(self.members, OneModel):
            return [(answer, None) for answer in answers]  # lm-eval's code sees the members' average only
        return list(zip(answers, self._latest, strict=True))

    def _rolling(self, requests: list[Instance], disable_tqdm: bool) -> list[tuple[float, ScoredRecord | None]]:
        """In mode fast all windows of all texts are scored together; lm-eval would pad batches of them as they come."""
        if self.mode == "exact":
            totals = super().loglikelihood_rolling(requests, disable_tqdm)
            check_finite(requests, totals)
            return [(total, None) for total in totals]
        windows: list[TokenRequest] = []
        texts: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        try:
            self._loglikelihood_tokens(windows, disable_tqdm)
        except NotFinite as error:
            raise not_finite(requests[texts[error.request]]) from error
        zeros = [0.0] * self.members.count
        totals_of = [ScoredRecord(zeros, zeros, True, 0, 0, math.inf) for _ in requests]
        for number, record in zip(texts, self._latest, strict=True):
            totals_of[number] = totals_of[number].followed_by(record)
        found = [replace(record, least_gap=0.0) if record.tokens == 0 else record for record in totals_of]
        return [(record.running[-1], record) for record in found]

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request: log-likelihood and whether greedy; the records are in ``_latest`` then.

        Raises:
            TooLong: a continuation does not fit (lm-eval stops at an assertion).
        """
        for index, (_, _, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise TooLong(index, len(continuation))
        if self.mode == "fast":
            self._latest = self._scored(requests, disable_tqdm)
            return [(record.running[-1], record.greedy) for record in self._latest]
        if self.store is None:
            answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        else:
            answers = self._stock_batches(requests, disable_tqdm, override_bs, self.store)
        self._latest = [stock_record(*pair, self.max_length) for pair in zip(requests, answers, strict=True)]
        return answers

    def _scored(self, requests: list[TokenRequest], disable_tqdm: bool) -> list[ScoredRecord]:
        """Mode fast: a record for each request.

        Raises:
            NotFinite: names the first request whose score is not.
        """
        if self._scorer is None:
            self._scorer = Scorer(self.model, self.members, self.tokens_per_pass)
        cut = [truncated(context, continuation, self.max_length) for _, context, continuation in requests]
        keys = [request_key("loglikelihood", request.context, request.continuation) for request, _ in cut]
        found: dict[int, ScoredRecord] = {}
        if self.store is not None:
            on_disk = {index: self.store.get(key) for index, key in enumerate(keys)}
            found = {index: record for index, record in on_disk.items() if isinstance(record, ScoredRecord)}
        self.kept += len(found)
        with progress_bar(len(requests), len(found), "log-likelihoods", disable_tqdm) as bar:
            for batch in self._scorer.scores([request for request, _ in cut], frozenset(found)):
                new = {
                    index: ScoredRecord(
                        running=scored.running,
                        members=scored.members,
                        greedy=scored.greedy,
                        tokens=len(cut[index][0].continuation),
                        truncated=cut[index][1],
                        least_gap=scored.least_gap,
                    )
                    for index, scored in batch.items()
                    if index not in found
                }
                if self.store is not None:
                    self.store.add({keys[index]: record for index, record in new.items()})
                found |= new
                bar.update(len(new))
        return [found[index] for index in range(len(requests))]

    def _stock_batches(
        self, requests: list[TokenRequest], disable_tqdm: bool, override_bs: int | None, store: AnswerStore
    ) -> list[tuple[float, bool]]:
        """Mode exact with a store: lm-eval's code, a batch of its own at a time.

        Batches are those of all requests; one that was not finished is computed whole, so that the bits do not depend
        on when an evaluation was ended.
        """
        cut = [truncated(context, continuation, self.max_length) for _, context, continuation in requests]
        batches, size = self._batches(requests, override_bs)
        keys = batch_keys([request_key("loglikelihood", part.context, part.continuation) for part, _ in cut], batches)
        self.kept += sum(store.get(key) is not None for key in keys)
        found: dict[int, tuple[float, bool]] = {}
        with progress_bar(len(requests), 0, "log-likelihoods", disable_tqdm) as bar:
            for batch in batches:
                records = {index: store.get(keys[index]) for index in batch}
                kept = {i: (r.running[-1], r.greedy) for i, r in records.items() if isinstance(r, ScoredRecord)}
                if len(kept) < len(batch):
                    part = [requests[index] for index in batch]
                    answers = super()._loglikelihood_tokens(part, disable_tqdm=True, override_bs=size)
                    kept = dict(zip(batch, answers, strict=True))
                    store.add(
                        {
                            keys[index]: stock_record(requests[index], answer, self.max_length)
                            for index, answer in kept.items()
                            if math.isfinite(answer[0])  # the caller, who knows the request's name, stops at another
                        }
                    )
                found |= kept
                bar.update(len(batch))
        return [found[index] for index in range(len(requests))]

    def _batches(self, requests: list[TokenRequest], override_bs: int | None) -> tuple[list[list[int]], int]:
        """Indices of the requests in each of lm-eval's batches, and their size in contexts."""
        if override_bs is not None:
            return [list(range(len(requests)))], override_bs
        size = self.batch_size
        if size == "auto":
            size = self._detect_batch_size([max(requests, key=lambda request: len(request[1] + request[2]))], 0)
        return stock_batches(requests, size, self.logits_cache), size

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, T)`` right-padded tokens to ``(B, T, V)`` scores: logits, or the ensemble's average in float32."""
        if isinstance(self.members, OneModel):
            return super()._model_call(inps, attn_mask, labels)
        average = RunningAverage(self.members.average)
        for numbers in passes(self.members, len(inps)):
            with self.members.active(numbers):
                logits = super()._model_call(inps.repeat(len(numbers), 1))  # (n*B, T, V), member-major
            average.add(logits.unflatten(0, (len(numbers), -1)))
        return average.value()

    # Generation

    def _generated(self, requests: list[Instance], disable_tqdm: bool) -> list[tuple[str, GeneratedRecord | None]]:
        """lm-eval's code, a batch of its own at a time, so that what is finished can be kept.

        Raises:
            UserError: a score is NaN or infinite.
        """
        plain = keys = generation_keys(requests)
        found: dict[int, GeneratedRecord] = {}
        with self._batch_size_found():
            batches = generation_batches(requests, self.tok_encode, self.batch_size)
            if self.mode == "exact" or any(sampled(request) for request in requests):  # drawn from the batch's seed
                keys = batch_keys(plain, batches)
            if self.store is not None:
                on_disk = {index: self.store.get(key) for index, key in enumerate(keys)}
                found = {index: record for index, record in on_disk.items() if isinstance(record, GeneratedRecord)}
            self.kept += len(found)
            with progress_bar(len(requests), len(found), "generated answers", disable_tqdm) as bar:
                for batch in batches:
                    if not found.keys() >= set(batch):
                        part = [requests[index] for index in batch]
                        try:
                            records = self._generated_batch(part, seed=int(plain[batch[0]][:8], 16))
                        except NotFinite as error:
                            raise not_finite(part[error.request]) from error
                        new = {i: r for i, r in zip(batch, records, strict=True) if i not in found}
                        if self.store is not None and not (self.mode == "exact" and sampled(part[0])):
                            self.store.add({keys[index]: record for index, record in new.items()})
                        found |= new
                        bar.update(len(new))
        return [(found[i].text, found[i] if self.mode == "fast" else None) for i in range(len(requests))]

    def _generated_batch(self, requests: list[Instance], seed: int) -> list[GeneratedRecord]:
        """One batch, in lm-eval's order. In mode fast sampling draws from the batch's own seed: what is drawn does not
        depend on what was generated before, so it is the same after an interruption."""
        if self.mode == "exact":
            texts = super().generate_until(requests, disable_tqdm=True)
            return [GeneratedRecord(text, [], [], [], [], 0.0, 0.0, 0) for text in texts]
        self._decoder = EnsembleDecoder(self.members, record=True)
        with torch.random.fork_rng() if sampled(requests[0]) else nullcontext():
            if sampled(requests[0]):
                torch.manual_seed(seed)
            texts = super().generate_until(requests, disable_tqdm=True)
        room = self.max_length - normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)["max_gen_toks"]
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        return [
            generated_record(self._decoder.steps, row, text, self.tokenizer, max(0, length - room))
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """``(B, T)`` left-padded prompts to ``(B, max_length)`` at most; the ensemble decodes with one shared token."""
        generation_kwargs["logits_processor"] = LogitsProcessorList([FiniteScores()])
        if self.mode == "fast":
            generation_kwargs["custom_generate"] = self._decoder
        elif not isinstance(self.members, OneModel):
            generation_kwargs["custom_generate"] = EnsembleDecoder(self.members)
        return super()._model_generate(context=context, max_length=max_length, stop=stop, **generation_kwargs)

    @contextmanager
    def _batch_size_found(self) -> Iterator[None]:
        """Inside, ``auto`` is the number that was found: lm-eval would look for it in every batch again."""
        asked = self.batch_size
        if asked == "auto":
            # On a CPU nothing runs out of memory, and the search would take minutes in passes of the whole context.
            on_cpu = self.mode == "fast" and self.device.type == "cpu"
            self.batch_size_per_gpu = CPU_BATCH_SIZE if on_cpu else self._detect_batch_size()
        try:
            yield
        finally:
            self.batch_size_per_gpu = asked

    def assert_adapter_active(self) -> None:
        """Make sure that the adapter changes the model's output.

        Raises:
            UserError: its logits are those of the base.
        """
        tokens = self.tokenizer("Below is an instruction that describes a task.", return_tensors="pt")["input_ids"]
        tokens = tokens.to(self.device)
        with torch.no_grad():
            adapted = self.model(tokens).logits
            with self.model.disable_adapter():
                base = self.model(tokens).logits
        if torch.equal(adapted, base):
            raise UserError(
                "the adapter does not change the model: its logits are those of the base on a test prompt.\n"
                "It was not trained (B is still zero), its weights were not found, or it belongs to another base."
            )
