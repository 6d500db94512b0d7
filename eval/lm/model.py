"""lm-eval's Hugging Face model with an ensemble over masks, and requests split over processes.

Without an ensemble lm-eval's own code runs, bit for bit. With one, ``loglikelihood``, ``loglikelihood_rolling`` and
``generate_until`` all see the members' average, because each of them goes through ``_model_call`` or
``_model_generate``.

Legend: N members, n members of one pass, B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from eval.lm.decode import EnsembleDecoder, RunningAverage, members_masked, passes
from eval.logs import quiet
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Ensemble

Answer = TypeVar("Answer")


class EnsembleLM(HFLM):
    """An adapter on its base, evaluated by lm-eval with or without an ensemble over masks.

        lm = EnsembleLM(model, tokenizer, batch_size=8)                                   # deterministic: stock HFLM
        lm = EnsembleLM(model, tokenizer, batch_size=8, dropout=LoraDropout(model, 0.5, 42), ensemble=Ensemble())
        lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

    Several processes each hold a whole model and call the same methods with the same requests: every process answers
    its share, and all get all answers. (lm-eval's own split needs accelerate, repeats requests to even the ranks out,
    returns samples out of order and fails on tasks with fewer documents than ranks.)
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        dropout: LoraDropout | None = None,
        ensemble: Ensemble | None = None,
        training_prompt: Callable[[str], str] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Wrap; nothing is loaded.

        Args:
            model: in eval mode, on its device.
            tokenizer: adds BOS by itself where training did.
            batch_size: requests per forward pass, before members multiply them.
            dropout: the masks of ``model``; none evaluates the deterministic model.
            ensemble: members, average and rows per pass; with ``dropout``.
            training_prompt: from an instruction to the prompt the adapter was trained on. lm-eval asks for it as the
                chat template, with ``apply_chat_template=True``.
            group: processes that share the requests, on a CPU backend; none: this one answers all.
        """
        if (dropout is None) != (ensemble is None):
            raise ValueError("dropout and ensemble go together: give both or neither")
        if ensemble is not None and ensemble.rows_per_pass is not None:
            batch_size = min(batch_size, ensemble.rows_per_pass)
        with quiet("lm_eval.models.huggingface"):  # warns that a model object skips its own multi-process setup
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.dropout = dropout
        self.ensemble = ensemble
        self.training_prompt = training_prompt
        self.group = group
        self.requests = 0
        """Answered so far, by all processes."""
        self.seconds = 0.0
        """Spent on them, without lm-eval's own preparation and scoring."""

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, T)`` right-padded tokens to ``(B, T, V)`` scores: logits, or the ensemble's average in float32."""
        if self.dropout is None or self.ensemble is None:
            return super()._model_call(inps, attn_mask, labels)
        average = RunningAverage(self.ensemble.average)
        for numbers in passes(self.ensemble.instances, len(inps), self.ensemble.rows_per_pass):
            with members_masked(self.dropout, self.ensemble, numbers):
                logits = super()._model_call(inps.repeat(len(numbers), 1))  # (n*B, T, V), member-major
            average.add(logits.unflatten(0, (len(numbers), -1)))
        return average.value()

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """``(B, T)`` left-padded prompts to ``(B, max_length)`` at most; the ensemble decodes with one shared token."""
        if self.dropout is not None and self.ensemble is not None:
            generation_kwargs["custom_generate"] = EnsembleDecoder(self.dropout, self.ensemble)
        return super()._model_generate(context=context, max_length=max_length, stop=stop, **generation_kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request: log-likelihood of the continuation, and whether it is the greedy one."""
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Per request: log-likelihood of the whole text."""
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

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
        return self._shared(super().generate_until, requests, disable_tqdm)

    def _shared(
        self, answers: Callable[[list[Instance], bool], list[Answer]], requests: list[Instance], disable_tqdm: bool
    ) -> list[Answer]:
        """All answers, each computed by one of the group's processes."""
        started = time.perf_counter()
        found = answers(requests, disable_tqdm) if self.group is None else self._dealt(answers, requests, disable_tqdm)
        self.seconds += time.perf_counter() - started
        self.requests += len(requests)
        return found

    def _dealt(
        self, answers: Callable[[list[Instance], bool], list[Answer]], requests: list[Instance], disable_tqdm: bool
    ) -> list[Answer]:
        """This process answers its share, and gets the others' answers."""
        rank = dist.get_rank(self.group)
        indices = share(requests, rank, dist.get_world_size(self.group))
        mine = answers([requests[index] for index in indices], disable_tqdm or rank != 0) if indices else []
        gathered: list[list[tuple[int, Answer]]] = [[] for _ in range(dist.get_world_size(self.group))]
        dist.all_gather_object(gathered, list(zip(indices, mine, strict=True)), group=self.group)
        return [answer for _, answer in sorted(itertools.chain(*gathered), key=lambda pair: pair[0])]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The task's whole prompt (description, examples, question) as instruction in the training prompt."""
        if self.training_prompt is None:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        instruction = "".join(message["content"] for message in chat_history if message["role"] != "assistant")
        begun = "".join(message["content"] for message in chat_history if message["role"] == "assistant")
        return self.training_prompt(instruction) + begun

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


def share(requests: list[Instance], rank: int, ranks: int) -> list[int]:
    """Indices of the requests that this rank answers.

    Documents are dealt out in turn. A document's requests stay together: lm-eval runs choices of one token that share
    a context in one pass.
    """
    documents = itertools.groupby(range(len(requests)), key=lambda i: (requests[i].task_name, requests[i].doc_id))
    return [index for turn, (_, indices) in enumerate(documents) for index in indices if turn % ranks == rank]
