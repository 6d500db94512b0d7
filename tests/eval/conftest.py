"""A pocket model with a random adapter, and small tasks with random documents."""

from __future__ import annotations

import copy
import gc
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model, with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.lora_dropout import LoraDropout

RATE, SEED, RANK, ALPHA = 0.5, 7, 4, 8.0


@dataclass
class Adapted:
    """The pocket base in float32 with a random adapter that really changes its output."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    dropout: LoraDropout
    dense_member: Callable[[int], PreTrainedModel]
    """Ensemble member n without peft and without our code: ``W0 + s B_hat A_hat`` in every adapted layer."""


@pytest.fixture(scope="session")
def adapted(pocket_base: Path) -> Adapted:
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(pocket_base, dtype=torch.float32)
    plain = copy.deepcopy(base).eval()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    dropout = LoraDropout(model, RATE, SEED)
    members: dict[int, PreTrainedModel] = {}

    def dense_member(number: int) -> PreTrainedModel:
        if number not in members:
            member = copy.deepcopy(plain)
            for name, masks in dropout.layer_masks("ensemble", [(number,)]).items():
                layer = dropout.layers[name].layer
                a = layer.lora_A["default"].weight * masks.kept_in[0] / (1 - RATE)
                b = layer.lora_B["default"].weight * masks.kept_out[0][:, None] / (1 - RATE)
                member.get_submodule(name).weight.data += ALPHA / RANK * (b @ a)
            members[number] = member
        return members[number]

    return Adapted(model, AutoTokenizer.from_pretrained(pocket_base), dropout, dense_member)


@pytest.fixture(scope="session")
def tokenizer(pocket_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket_base)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A base of two layers of width 32 with random weights, and the pocket base's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tiny_model("llama, grouped queries").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model() -> PeftModel:
    """A tiny LLaMA with grouped queries and a random adapter."""
    return with_adapter(tiny_model("llama, grouped queries"))


@pytest.fixture(scope="session")
def dropout(model: PeftModel) -> LoraDropout:
    return LoraDropout(model, RATE, SEED)


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """The search for an automatic batch size collects garbage at every step, half a second each after all imports."""
    gc.freeze()
    yield
    gc.unfreeze()


WORDS = ["the", "old", "dog", "house", "river", "walked", "slowly", "saw", "her", "letter", "under", "white", "never"]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks over 11 random documents: ``tiny_choice``, ``tiny_words`` (generation), ``tiny_text`` (rolling),
    ``tiny_last`` (LAMBADA-like)."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(SEED)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    documents = [
        {
            "question": words(draw.randint(2, 25)),
            "choices": [words(draw.randint(1, 3)) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(11)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = f"""\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
"""
    (folder / "tiny_choice.yaml").write_text(
        f"""{common}task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "tiny_words.yaml").write_text(
        f"""{common}task: tiny_words
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "tiny_last.yaml").write_text(
        f"""{common}task: tiny_last
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
    )
    (folder / "tiny_text.yaml").write_text(
        f"""{common}task: tiny_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
    )
    return folder
