"""lm-eval's model: stock without an ensemble, equal to dense members averaged by hand with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import with_adapter

from eval.lm import EnsembleLM
from eval.lm.members import MaskedMembers
from eval.lm.sharing import share
from eval.lm.store import AnswerStore
from pipeline.base import load_base
from pipeline.data import PromptTemplate
from pipeline.data.tokenise import tokenised_row
from pipeline.errors import UserError
from pipeline.recipe.schema import Base, Ensemble, Source


def evaluated(lm: HFLM, folder: Path, tasks: list[str], **arguments: Any) -> dict[str, Any]:
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(tasks)
    results = lm_eval.evaluate(lm, loaded, bootstrap_iters=0, **arguments)
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Every log-likelihood and generated text, by task."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def loglikelihood_requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0, ("t", number, 1)) for number, pair in enumerate(pairs)]


PAIRS = [
    ("The old man", " went home"),
    ("The old man", " sat"),
    ("She", " walked slowly to the river and saw him"),
    ("In the morning the three children asked her for", " a letter"),
]


@pytest.mark.parametrize(("system", "batch_size"), [("base", 3), ("deterministic", 3)])
def test_without_an_ensemble_every_answer_is_stock_lm_evals(
    adapted: Any, task_folder: Path, system: str, batch_size: int
) -> None:
    tasks = ["tiny_choice", "tiny_words", "tiny_text"]
    adapters_on = system == "deterministic"
    ours = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=batch_size)
    stock = HFLM(pretrained=adapted.model, tokenizer=adapted.tokenizer, batch_size=batch_size)
    if adapters_on:
        found, expected = (answers(evaluated(lm, task_folder, tasks)) for lm in (ours, stock))
    else:
        with adapted.model.disable_adapter():
            found, expected = (answers(evaluated(lm, task_folder, tasks)) for lm in (ours, stock))
    assert found == expected  # bit for bit


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize(
    ("storage", "batch_size"),
    [
        ("float32", 1),
        ("float32", 3),
        ("float32", "auto"),
        ("bfloat16", 3),
        ("bfloat16", "auto"),
        ("nf4", 1),
        ("nf4", 3),
    ],
)
def test_every_request_type_is_stock_lm_evals(
    tiny_base: Path, tokenizer: Any, task_folder: Path, tmp_path: Path, storage: str, batch_size: Any
) -> None:
    """Bit for bit: choices, last words, texts and generated answers; with and without kept answers."""
    quantization, dtype = ("nf4", "bfloat16") if storage == "nf4" else ("none", storage)
    model = with_adapter(load_base(Base(model=str(tiny_base), quantization=quantization, dtype=dtype)))
    tasks = ["tiny_choice", "tiny_last", "tiny_text", "tiny_words"]

    def results(lm: HFLM) -> dict[str, Any]:
        lm.max_batch_size = 2  # the search for the automatic size begins here
        found = evaluated(lm, task_folder, tasks)
        return {"answers": answers(found), "results": found["results"]}

    stock = results(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size))
    assert results(EnsembleLM(model, tokenizer, batch_size=batch_size)) == stock
    kept: list[int] = []
    for _ in range(2):
        store = AnswerStore.open(tmp_path, {"storage": storage})
        lm = EnsembleLM(model, tokenizer, batch_size=batch_size, store=store)
        assert results(lm) == stock
        kept.append(lm.kept)
    assert kept[0] == 0 and kept[1] >= lm.requests, "texts count by windows"


def test_sampling_in_mode_exact_is_stock_lm_evals(tiny_base: Path, tokenizer: Any) -> None:
    """In several batches, from torch's own random stream."""
    model = with_adapter(load_base(Base(model=str(tiny_base), quantization="none", dtype="float32")))
    given = {"until": ["."], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    requests = [Instance("generate_until", {}, (pair[0], dict(given)), 0, ("t", n, 1)) for n, pair in enumerate(PAIRS)]
    texts = []
    for lm in (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        EnsembleLM(model, tokenizer, batch_size=3),
    ):
        torch.manual_seed(5)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1] and len(set(texts[0])) == 4


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_log_likelihoods_equal_dense_members_averaged_by_hand(adapted: Any, average: str) -> None:
    ensemble = Ensemble(instances=3, average=average)
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=4, members=MaskedMembers(adapted.dropout, ensemble))
    found = lm.loglikelihood(loglikelihood_requests(PAIRS), disable_tqdm=True)
    for (context, continuation), (log_likelihood, greedy) in zip(PAIRS, found, strict=True):
        prompt = adapted.tokenizer(context)["input_ids"]
        ids = adapted.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        logits = torch.stack([adapted.dense_member(n)(ids).logits[0, :-1] for n in range(3)])  # (N, T-1, V)
        scores = logits.mean(0) if average == "logits" else logits.softmax(-1).mean(0).log()
        scores, targets = scores.log_softmax(-1)[len(prompt) - 1 :], ids[0, len(prompt) :]
        expected = scores.gather(1, targets[:, None]).sum().item()
        assert log_likelihood == pytest.approx(expected, abs=1e-5 * (1 + abs(expected)))
        assert greedy == bool((scores.argmax(-1) == targets).all())


@pytest.mark.parametrize(("rows_per_pass", "balanced"), [(1, False), (5, True)])
def test_scores_do_not_depend_on_chunks_of_members(
    adapted: Any, task_folder: Path, rows_per_pass: int, balanced: bool
) -> None:
    def scores(limit: int | None) -> dict[str, list[Any]]:
        ensemble = Ensemble(instances=3, average="probabilities", rows_per_pass=limit, balanced=balanced)
        lm = EnsembleLM(
            adapted.model, adapted.tokenizer, batch_size=4, members=MaskedMembers(adapted.dropout, ensemble)
        )
        return answers(evaluated(lm, task_folder, ["tiny_choice", "tiny_words", "tiny_text"], limit=4))

    whole, chunked = scores(None), scores(rows_per_pass)
    assert whole["tiny_words"] == chunked["tiny_words"]
    numbers = [
        torch.tensor([[float(resp[0][0]) for resp in sample] for sample in found["tiny_choice"]], dtype=torch.float64)
        for found in (whole, chunked)
    ]
    torch.testing.assert_close(*numbers, atol=1e-5, rtol=1e-5)
    rolling = [torch.tensor(found["tiny_text"], dtype=torch.float64) for found in (whole, chunked)]
    torch.testing.assert_close(*rolling, atol=1e-5, rtol=1e-5)


def test_no_pass_is_larger_than_rows_per_pass(adapted: Any, task_folder: Path) -> None:
    rows: list[int] = []
    hook = adapted.model.get_input_embeddings().register_forward_hook(lambda *a: rows.append(a[1][0].shape[0]))
    ensemble = Ensemble(instances=4, rows_per_pass=6)
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=16, members=MaskedMembers(adapted.dropout, ensemble))
    evaluated(lm, task_folder, ["tiny_choice", "tiny_words"], limit=8)
    hook.remove()
    assert max(rows) == 6


def test_the_ensemble_differs_from_the_deterministic_adapter_in_every_request_type(
    adapted: Any, task_folder: Path
) -> None:
    tasks = ["tiny_choice", "tiny_words", "tiny_text"]
    off = answers(evaluated(EnsembleLM(adapted.model, adapted.tokenizer, batch_size=4), task_folder, tasks))
    lm = EnsembleLM(
        adapted.model, adapted.tokenizer, batch_size=4, members=MaskedMembers(adapted.dropout, Ensemble(instances=2))
    )
    on = answers(evaluated(lm, task_folder, tasks))
    assert all(off[task] != on[task] for task in tasks)


def test_prompt_tokens_are_those_of_training(adapted: Any, task_folder: Path) -> None:
    """What reaches the embedding, for both request types, against the training room's own tokens."""
    template = PromptTemplate(Source(path="unused.json"))  # Alpaca's
    lm = EnsembleLM(
        adapted.model,
        adapted.tokenizer,
        batch_size=1,
        training_prompt=lambda instruction: template.render({"instruction": instruction, "input": ""}),
    )
    fed: list[list[int]] = []
    hook = adapted.model.get_input_embeddings().register_forward_hook(lambda *a: fed.append(a[1][0][0].tolist()))
    found = {
        task: evaluated(lm, task_folder, [task], limit=2, apply_chat_template=True)["samples"][task]
        for task in ("tiny_choice", "tiny_words")
    }
    hook.remove()
    for sample in found["tiny_choice"]:
        prompt = template.render({"instruction": sample["doc"]["question"], "input": ""})
        for choice in sample["doc"]["choices"]:
            trained = tokenised_row(prompt, choice, adapted.tokenizer, max_length=512)["input_ids"]
            assert trained[0] == adapted.tokenizer.bos_token_id
            assert trained[:-2] in fed, "the last choice token and EOS are not fed"
    for sample in found["tiny_words"]:
        prompt = template.render({"instruction": sample["doc"]["question"], "input": ""})
        assert adapted.tokenizer(prompt)["input_ids"] in fed


def test_without_a_training_prompt_the_tasks_own_tokens_start_with_bos(adapted: Any) -> None:
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=1)
    assert lm.tok_encode("The old man") == adapted.tokenizer("The old man")["input_ids"]
    assert lm.tok_batch_encode(["The old man"])[0][0].tolist() == adapted.tokenizer("The old man")["input_ids"]


def test_an_adapter_that_does_nothing_is_refused(adapted: Any) -> None:
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=1)
    lm.assert_adapter_active()
    weights = {name: p.clone() for name, p in adapted.model.named_parameters() if "lora_B" in name}
    try:
        for name, parameter in adapted.model.named_parameters():
            if name in weights:
                parameter.data.zero_()
        with pytest.raises(UserError, match="does not change the model"):
            lm.assert_adapter_active()
    finally:
        for name, parameter in adapted.model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])


def test_more_new_tokens_than_the_context_holds_are_refused(adapted: Any) -> None:
    lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=1)
    request = Instance("generate_until", {}, ("The", {"until": ["."], "max_gen_toks": 512}), 0, ("long", 0, 1))
    with pytest.raises(UserError, match="task long: asks for 512 new tokens, but the base's context is 512"):
        lm.generate_until([request])


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12), ranks=st.integers(1, 5))
def test_shares_are_whole_documents_and_cover_every_request_once(sizes: list[int], ranks: int) -> None:
    requests = [
        Instance("loglikelihood", {}, (str(document), str(choice)), choice, ("task", document, 1))
        for document, size in enumerate(sizes)
        for choice in range(size)
    ]
    shares = [share(requests, rank, ranks) for rank in range(ranks)]
    assert sorted(index for part in shares for index in part) == list(range(len(requests)))
    owners = [{requests[index].doc_id for index in part} for part in shares]
    assert sum(len(owner) for owner in owners) == len(sizes)
    counts = [len(owner) for owner in owners]
    assert max(counts) - min(counts) <= 1
    twins = [
        Instance("loglikelihood", {}, request.args, request.idx, ("twin", request.doc_id, 1)) for request in requests
    ]
    for rank, part in enumerate(shares):
        assert share(requests + twins, rank, ranks) == part + [len(requests) + index for index in part]
