"""The analysis of a real run: lm-eval's own values found again, in both modes, fresh and from a folder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from eval.analysis.analyse import analyse
from eval.analysis.answers import ChoiceAnswers, GeneratedAnswers, RollingAnswers, read_answers
from eval.analysis.schema import TaskAnalysis
from eval.lm import EnsembleLM
from eval.lm.members import MaskedMembers
from eval.results import SystemScores, write_samples
from eval.run import system_scores
from pipeline.errors import UserError
from pipeline.recipe.schema import Ensemble, Eval

MEMBERS = 3
DRAWS = 1000
TASKS = ["tiny_pair", "tiny_group", "tiny_last", "tiny_articles", "tiny_numbers"]


@pytest.fixture(scope="module")
def kinds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of every kind that lm-eval knows, over 13 random documents."""
    folder = tmp_path_factory.mktemp("kinds")
    draw = random.Random(2)

    def words(count: int) -> str:
        return " ".join(draw.choices(["the", "old", "dog", "river", "7", "12", "letter", "white"], k=count))

    documents = [
        {
            "question": words(draw.randint(2, 9)),
            "label": number % 2,
            "choices": [words(draw.randint(1, 3)) for _ in range(2 + number % 3)],
            "answer": draw.randrange(2),
            "story": f"story {number % 6}",
        }
        for number in range(13)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\nnum_fewshot: 0\n"
    choice = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
"""
    files = {
        "tiny_pair": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["no", "yes"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: f1}, {metric: mcc}, {metric: brier_score}]
""",
        "tiny_first": choice,
        "tiny_second": choice + "description: 'Answer. '\nmetadata: {cluster: story}\n",
        "tiny_last": """output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " dog"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
        "tiny_articles": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
        "tiny_numbers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: word, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    (folder / "tiny_group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_first, tiny_second]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def scores(adapted: Any, kinds_folder: Path) -> dict[str, SystemScores]:
    """The ensemble in mode fast, and the one adapter in mode exact."""
    manager = TaskManager(include_path=str(kinds_folder), include_defaults=False)
    found = {}
    for mode, members in (
        ("fast", MaskedMembers(adapted.dropout, Ensemble(instances=MEMBERS, average="probabilities"))),
        ("exact", None),
    ):
        loaded = manager.load(TASKS)
        groups = list(loaded["groups"].values())
        inside = {name for group in groups for name in group.child_names}
        tasks = [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]
        lm = EnsembleLM(adapted.model, adapted.tokenizer, batch_size=4, members=members, mode=mode)
        found[mode] = system_scores(lm, tasks, Eval(tasks=TASKS))
    return found


@pytest.fixture(scope="module")
def analyses(scores: dict[str, SystemScores]) -> dict[str, dict[str, TaskAnalysis]]:
    return {mode: analyse(found.samples, found.results, DRAWS) for mode, found in scores.items()}


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_lm_evals_own_values_are_found_again(scores: Any, analyses: Any, mode: str) -> None:
    own = scores[mode].results["results"]
    compared = 0
    for task, analysis in analyses[mode].items():
        for key, value in own.get(task, {}).items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            ours = analysis.metrics.get(metric) or analysis.metrics.get(key)
            if metric == "brier_score":
                ours = analysis.metrics["brier"]
            if ours is None:  # F1 and Matthews of one class only, which scikit-learn calls 0
                assert metric in ("f1", "mcc") and value == 0, (task, key)
                continue
            assert ours.value == pytest.approx(value, rel=1e-9), (task, key)
            compared += 1
    assert compared >= 14
    assert set(analyses[mode]) == {*scores[mode].samples, "tiny_group", "overall"}


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_every_kind_is_told_apart(analyses: Any, mode: str) -> None:
    found = {task: (analysis.kind, analysis.primary, analysis.strata) for task, analysis in analyses[mode].items()}
    assert found == {
        "tiny_pair": ("choice", "acc", 1),
        "tiny_first": ("choice", "acc", 1),
        "tiny_second": ("choice", "acc", 1),
        "tiny_group": ("choice", "acc", 2),
        "overall": ("choice", "acc", 3),
        "tiny_last": ("other", "acc", 1),
        "tiny_articles": ("rolling", "bits_per_byte", 1),
        "tiny_numbers": ("generation", "exact_match,whole", 1),
    }
    assert analyses[mode]["tiny_second"].clusters == 6
    assert analyses[mode]["tiny_group"].clusters == 13 + 6
    assert any("share 6 texts" in note for note in analyses[mode]["tiny_second"].notes)
    assert analyses[mode]["tiny_first"].metrics["acc"].interval == "Wilson"
    assert "cluster" in analyses[mode]["tiny_second"].metrics["acc"].interval


def test_curves_begin_with_member_1_and_end_in_the_run(scores: Any, analyses: Any) -> None:
    for task, analysis in analyses["fast"].items():
        assert [point.members for point in analysis.curve] == list(range(1, MEMBERS + 1)), task
        last = analysis.curve[-1].scores
        assert last, task
        for name, value in last.items():
            expected = analysis.ece.value if name == "ece" else analysis.metrics[name].value
            assert value == pytest.approx(expected, rel=1e-12), (task, name)
    samples = scores["fast"].samples["tiny_first"]
    alone = [
        int(np.argmax([record["members"][0] for record in sample["lora_dropout"]["requests"]])) == sample["target"]
        for sample in samples
    ]
    assert analyses["fast"]["tiny_first"].curve[0].scores["acc"] == pytest.approx(np.mean(alone))


def test_one_model_is_an_ensemble_of_one(analyses: Any) -> None:
    for task, analysis in analyses["exact"].items():
        assert analysis.jensen is None, task
        if analysis.kind == "choice":
            assert len(analysis.curve) == 1
            assert analysis.entropy.mutual_information == pytest.approx(0, abs=1e-12)
    generation = analyses["exact"]["tiny_numbers"]
    assert generation.ece is None and not generation.confidences
    assert any("mode fast" in note for note in generation.notes)


def test_the_gap_of_jensen_is_not_negative_per_token(analyses: Any) -> None:
    for task, analysis in analyses["fast"].items():
        assert analysis.jensen.per_token >= -1e-5, task
        assert analysis.jensen.least >= -1e-5, task


def test_confidence_in_texts_is_told_for_both_filters(analyses: Any) -> None:
    analysis = analyses["fast"]["tiny_numbers"]
    ways = [f"{way},{name}" for name in ("whole", "word") for way in ("length_normalised", "first_answer_token")]
    assert sorted(analysis.confidences) == sorted(ways)
    assert analysis.ece == analysis.confidences["length_normalised,whole"].ece
    assert analysis.metrics["brier_of_answer"] == analysis.confidences[ways[0]].metrics["brier_of_answer"]
    assert analysis.entropy.total >= analysis.entropy.expected > 0
    assert [mistake.confidence for mistake in analysis.mistakes] == sorted(
        (mistake.confidence for mistake in analysis.mistakes), reverse=True
    )


def test_a_folder_gives_the_same_answers(scores: Any, tmp_path: Path) -> None:
    write_samples({"ensemble": scores["fast"]}, tmp_path)
    for task, kind in (
        ("tiny_first", ChoiceAnswers),
        ("tiny_articles", RollingAnswers),
        ("tiny_last", RollingAnswers),
        ("tiny_numbers", GeneratedAnswers),
    ):
        answers = read_answers(tmp_path, "ensemble", task)
        assert isinstance(answers, kind)
        assert len(answers.members) == MEMBERS
    words = read_answers(tmp_path, "ensemble", "tiny_articles")
    assert isinstance(words, RollingAnswers)
    assert words.words is not None and words.bytes is not None
    perplexity = math.exp(-words.loglikelihood.sum() / words.words.sum())
    own = scores["fast"].results["results"]["tiny_articles"]["word_perplexity,none"]
    assert perplexity == pytest.approx(own)


def test_damaged_folders_are_told(scores: Any, tmp_path: Path) -> None:
    write_samples({"ensemble": scores["fast"]}, tmp_path)
    with pytest.raises(UserError, match="did not evaluate base on tiny_first"):
        read_answers(tmp_path, "base", "tiny_first")
    path = tmp_path / "samples_ensemble_tiny_first.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(UserError, match="line 13 is not JSON"):
        read_answers(tmp_path, "ensemble", "tiny_first")
    path.write_text(whole.replace('"lora_dropout"', '"other"'))
    with pytest.raises(UserError, match="line 1 lacks the key lora_dropout"):
        read_answers(tmp_path, "ensemble", "tiny_first")
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_answers(tmp_path, "ensemble", "tiny_first")
