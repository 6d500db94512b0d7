"""Answers to single questions, by the deterministic adapter or its ensemble, and how sure the model was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from eval.lm.decode import EnsembleDecoder, Step
from eval.lm.members import MaskedMembers, OneModel
from eval.prompt import TrainingPrompt
from pipeline.adapter.check import check_adapter, why_unmasked
from pipeline.adapter.files import adapter_dropout, load_adapter, read_settings
from pipeline.base import load_base, load_tokenizer
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe import Recipe, load_recipe, schema
from pipeline.run.folder import RECIPE_FILE


@dataclass(frozen=True)
class Confidence:
    """Probabilities of the tokens of one answer, its ending included, before temperature."""

    tokens: int
    sequence: float
    """exp(mean log p): the geometric mean over tokens, so that long answers are not less sure by their length."""
    first: float
    """Of the first token."""
    members: tuple[float, ...]
    """``sequence`` of this very answer under each member alone; a single value where there is no ensemble."""

    def in_words(self) -> str:
        """One line for the terminal."""
        text = f"confidence {self.sequence:.3f} per token over {self.tokens}, {self.first:.3f} in the first"
        if len(self.members) == 1:
            return text
        low, high = min(self.members), max(self.members)
        return f"{text}; each of the {len(self.members)} members alone {low:.3f} to {high:.3f}"


def confidence(steps: Sequence[Step]) -> Confidence:
    """Of an answer to one prompt (B = 1) of at least one token."""
    chosen = torch.cat([step.running[-1] for step in steps]).double()  # (T,) log-probabilities
    members = torch.cat([step.members for step in steps], dim=1).double()  # (N, T)
    return Confidence(
        tokens=len(chosen),
        sequence=math.exp(chosen.mean()),
        first=math.exp(chosen[0]),
        members=tuple(members.mean(dim=1).exp().tolist()),
    )


def question_prompt(recipe: Recipe, question: str, context: str = "") -> str:
    """The question in the training run's prompt.

    Args:
        recipe: of the training run.
        question: the instruction.
        context: the input that it is about.

    Raises:
        UserError: the prompt has no place for the context.
    """
    prompt = TrainingPrompt(recipe)
    if context and prompt.render(question, context) == prompt.render(question):
        raise UserError("--input: this adapter was trained on prompts without an input; put it into the question")
    return prompt.render(question, context)


@dataclass
class Answerer:
    """A loaded adapter that answers."""

    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    dropout: LoraDropout | None
    """None: the deterministic adapter."""
    ensemble: schema.Ensemble

    def in_words(self) -> str:
        """What answers, in one line."""
        if self.dropout is None:
            return f"{self.recipe.name}: the deterministic adapter"
        members = f"{self.ensemble.instances} balanced" if self.ensemble.balanced else str(self.ensemble.instances)
        return f"{self.recipe.name}: an ensemble of {members}, average of {self.ensemble.average}"

    def answer(self, prompt: str, max_new_tokens: int, temperature: float) -> Confidence:
        """Print the answer as it is generated, then return how sure the model was.

        Args:
            prompt: from :func:`question_prompt`.
            max_new_tokens: at most; the model's context may end earlier.
            temperature: 0 takes the most probable token; otherwise torch's generator samples.

        Raises:
            UserError: the prompt fills the model's context.
        """
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        length = inputs["input_ids"].shape[1]
        context = self.model.config.max_position_embeddings
        if length >= context:
            raise UserError(
                f"the prompt has {length} tokens; this base reads {context}, the answer included. Shorten it."
            )
        decoder = EnsembleDecoder(
            OneModel() if self.dropout is None else MaskedMembers(self.dropout, self.ensemble),
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            record=True,
        )
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}
        self.model.generate(
            **inputs,
            custom_generate=decoder,
            generation_config=GenerationConfig(
                max_new_tokens=min(max_new_tokens, context - length),
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                **({"do_sample": False} | sampling),
            ),
        )
        return confidence(decoder.steps)


def load_answerer(
    folder: Path,
    ensemble: bool | None = None,
    instances: int | None = None,
    average: str | None = None,
    base: str | None = None,
) -> Answerer:
    """The adapter of a training run on the base it was trained on.

    Args:
        folder: that ``launch/sft.py`` wrote.
        ensemble: masks on; by default where the adapter was trained with LoRA Dropout.
        instances: members; the recipe's number by default.
        average: ``logits`` or ``probabilities``; the recipe's by default.
        base: where the base is now, if it has moved since.

    Raises:
        UserError: no adapter or no recipe there; arguments that would have no effect; the base cannot be had.
    """
    settings = read_settings(folder)
    trained_masked = settings is not None and settings.masked
    if ensemble and not trained_masked:
        raise UserError(
            f"--ensemble: {folder} {why_unmasked(settings)}; masks at test time only are worse than none. "
            "Leave the option out."
        )
    masked = trained_masked if ensemble is None else ensemble
    for option, value in (("--instances", instances), ("--average", average)):
        if value is not None and not masked:
            reason = "--deterministic asks for no ensemble" if trained_masked else f"it {why_unmasked(settings)}"
            raise UserError(f"{option}: {folder} answers without an ensemble ({reason}), so it would have no effect")
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise UserError(
            f"{folder}: no {RECIPE_FILE} beside the adapter, so its base and its prompt are not known.\n"
            "Expected the whole folder that launch/sft.py wrote."
        )
    recipe = load_recipe(file, [] if base is None else [f"base.model={json.dumps(base)}"])
    chosen = {"instances": instances, "average": average}
    check_adapter(recipe.base, folder)
    tokenizer = load_tokenizer(recipe.base)
    model = load_adapter(load_base(recipe.base), folder)
    return Answerer(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        dropout=adapter_dropout(model, settings) if settings is not None and masked else None,
        ensemble=recipe.eval.ensemble.model_copy(update={k: v for k, v in chosen.items() if v is not None}),
    )
