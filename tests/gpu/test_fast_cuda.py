"""Mode fast on a CUDA device. Unmeasured so far: no run of this file on a GPU is on record."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.members import MaskedMembers
from eval.lm.records import ScoredRecord
from pipeline.base import load_base
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Base, Ensemble

sys.path.append(str(Path(__file__).resolve().parents[1] / "eval"))
from tiny_models import questions, requests_of, sentence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
PAIRS = [*questions(3, 30, 60), ("She", " saw"), ("The old", " dog walked")]


@pytest.fixture(scope="module")
def tokenizer(pocket_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket_base)


def adapted(base: Path, device: str = "cuda", **storage: Any) -> PeftModel:
    """The pocket base with a random adapter, equal on every device."""
    model = load_base(Base(model=str(base), **storage))
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).eval().requires_grad_(False)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
        elif "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return peft_model.to(device) if storage.get("quantization") == "none" else peft_model


def members(model: PeftModel, **ensemble: Any) -> MaskedMembers:
    return MaskedMembers(LoraDropout(model, 0.5, 7), Ensemble(**{"instances": 8, **ensemble}))


def scored(lm: EnsembleLM) -> tuple[torch.Tensor, list[bool]]:
    """``(requests, 2N)`` running and members' scores, and which are greedy."""
    lm.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    records = [record for record in lm.records.values() if isinstance(record, ScoredRecord)]
    return torch.tensor([r.running + r.members for r in records]).double(), [r.greedy for r in records]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_scores_are_the_cpus_and_stock_lm_evals(
    pocket_base: Path, tokenizer: PreTrainedTokenizerBase, average: str
) -> None:
    """float32; TF32 is off by default."""
    storage = {"quantization": "none", "dtype": "float32"}
    found = {}
    for device in ("cpu", "cuda"):
        model = adapted(pocket_base, device, **storage)
        lm = EnsembleLM(
            model, tokenizer, batch_size=8, members=members(model, instances=3, average=average), mode="fast"
        )
        found[device] = scored(lm)
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], atol=2e-4, rtol=2e-5)
    requests = requests_of("loglikelihood", PAIRS)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    ours = EnsembleLM(model, tokenizer, batch_size=8, mode="fast").loglikelihood(requests, disable_tqdm=True)
    scores = [torch.tensor([score for score, _ in part]).double() for part in (ours, stock)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"tokens_per_pass": 200}, {"rows_per_pass": 3}, {"mode": "exact"}], ids=str)
def test_scores_do_not_depend_on_how_they_are_computed(
    pocket_base: Path, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    model = adapted(pocket_base, quantization="none", dtype="float32")
    expected, greedy = scored(EnsembleLM(model, tokenizer, batch_size=8, members=members(model), mode="fast"))
    chunked = members(model, rows_per_pass=settings.get("rows_per_pass"))
    mode = settings.get("mode", "fast")
    tokens = settings.get("tokens_per_pass")
    lm = EnsembleLM(model, tokenizer, batch_size=8, members=chunked, mode=mode, tokens_per_pass=tokens)
    answers = lm.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    scores = torch.tensor([score for score, _ in answers]).double()
    torch.testing.assert_close(scores, expected[:, 7], atol=1e-4, rtol=1e-5)
    assert [found for _, found in answers] == greedy


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bfloat16_and_4_bit_differ_by_rounding(
    pocket_base: Path, tokenizer: PreTrainedTokenizerBase, quantization: str
) -> None:
    """Largest difference and flipped choices against stock at batch size 1: read them with ``-s``. On a CPU: 0.085 and
    0.078 nats, none flipped."""
    model = adapted(pocket_base, quantization=quantization, dtype="bfloat16")
    requests = requests_of("loglikelihood", PAIRS)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    ours = EnsembleLM(model, tokenizer, batch_size=8, mode="fast").loglikelihood(requests, disable_tqdm=True)
    scores = [torch.tensor([score for score, _ in part]) for part in (ours, stock)]
    flips = int((scores[0][:120].view(30, 4).argmax(1) != scores[1][:120].view(30, 4).argmax(1)).sum())
    difference = float((scores[0] - scores[1]).abs().max())
    print(f"{quantization}: {difference:.3f} nats, {flips} of 30 choices flipped")
    assert difference < 2.0 and flips <= 3


def test_generated_texts_do_not_depend_on_how_they_are_computed(
    pocket_base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = adapted(pocket_base, quantization="none", dtype="float32")
    draw = random.Random(3)
    given = {"until": ["."], "max_gen_toks": 12}
    requests = requests_of("generate_until", [(sentence(draw, 2, 40), dict(given)) for _ in range(9)])
    texts = [
        EnsembleLM(model, tokenizer, batch_size=size, members=members(model, rows_per_pass=rows), mode=mode)
        .generate_until(requests, disable_tqdm=True)
        for size, rows, mode in ((9, None, "fast"), (1, None, "fast"), (4, 5, "fast"), (4, None, "exact"))
    ]  # fmt: skip
    assert texts[1:] == texts[:1] * 3 and len(set(texts[0])) > 1


def test_members_and_rows_are_chunked_where_the_device_is_full(
    pocket_base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The device's own out of memory, under a limit on this process; and the automatic batch size."""
    model = adapted(pocket_base, quantization="none", dtype="float32")
    expected, _ = scored(EnsembleLM(model, tokenizer, batch_size=8, members=members(model), mode="fast"))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 160 * 2**20) / total)
    try:
        lm = EnsembleLM(model, tokenizer, batch_size=8, members=members(model), mode="fast", tokens_per_pass=1_000_000)
        found, _ = scored(lm)
        assert lm._scorer is not None and lm._scorer._most_members < 8, "the limit was felt"
        automatic = EnsembleLM(model, tokenizer, batch_size="auto", members=members(model))
        answers = automatic.loglikelihood(requests_of("loglikelihood", PAIRS[:20]), disable_tqdm=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    scores = torch.tensor([score for score, _ in answers]).double()
    torch.testing.assert_close(scores, expected[:20, 7], atol=1e-4, rtol=1e-5)
