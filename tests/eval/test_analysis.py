"""The analysis against hand-computed cases, scikit-learn, and properties that hold for all answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from analysis_samples import choice_sample, choice_samples, generation_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef, roc_auc_score

from eval.analysis.analyse import OVERALL, analyse, groups_of
from eval.analysis.answers import ChoiceAnswers, GeneratedAnswers, answers_of, choice_answers
from eval.analysis.groups import joined_choices
from eval.analysis.schema import TaskAnalysis
from eval.statistics.proportions import wilson

DRAWS = 1000


def analysed(samples: list[dict[str, Any]], **results: Any) -> TaskAnalysis:
    return analyse({"task": samples}, results, DRAWS)["task"]


# One task


def test_scores_by_hand() -> None:
    # probabilities 3/4 and 1/4 (right), 1/6 and 5/6 (wrong), 1/2 and 1/2: the first of ties is the answer (right)
    samples = [
        choice_sample(0, np.log([[0.3, 0.1]]), gold=0),
        choice_sample(1, np.log([[0.1, 0.5]]), gold=0),
        choice_sample(2, np.log([[0.2, 0.2]]), gold=0),
    ]
    found = analysed(samples)
    assert found.metrics["acc"].value == pytest.approx(2 / 3)
    ends = wilson(2, 3)
    assert (found.metrics["acc"].low, found.metrics["acc"].high) == (float(ends.low), float(ends.high))
    assert found.metrics["nll"].value == pytest.approx(-np.log([0.75, 1 / 6, 0.5]).mean())
    assert found.metrics["brier"].value == pytest.approx(np.mean([2 * 0.25**2, 2 * (5 / 6) ** 2, 2 * 0.5**2]))
    assert found.metrics["brier_of_answer"].value == pytest.approx(np.mean([0.25**2, (5 / 6) ** 2, 0.5**2]))
    assert found.metrics["overconfidence"].value == pytest.approx((0.75 + 5 / 6 + 0.5) / 3 - 2 / 3)
    assert found.metrics["auroc"].value == 0  # the wrong answer is the surest
    assert found.metrics["aurc"].value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found.ece is not None
    assert found.ece.value == pytest.approx((0.25 + 5 / 6 + 0.5) / 3)
    assert [(bar.count, bar.confidence) for bar in found.bins] == [
        (1, pytest.approx(share)) for share in (0.5, 0.75, 5 / 6)
    ]
    assert [mistake.doc_id for mistake in found.mistakes] == [1]
    assert (found.mistakes[0].answer, found.mistakes[0].target) == ("choice 1", "choice 0")
    assert found.risk_coverage == [(1 / 3, 1.0), (2 / 3, 0.5), (1.0, 1 / 3)]


def test_scores_are_scikit_learns() -> None:
    samples = choice_samples(300, 4, seed=1, fewer=False)
    found, answers = analysed(samples), choice_answers("task", samples)
    probabilities = softmax(answers.loglikelihoods, axis=1)
    assert found.metrics["nll"].value == pytest.approx(log_loss(answers.gold, probabilities, labels=range(4)))
    auroc = roc_auc_score(answers.correct, probabilities.max(axis=1))
    assert found.metrics["auroc"].value == pytest.approx(auroc)
    parts = found.brier_parts
    assert parts is not None
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert found.metrics["brier_of_answer"].value == pytest.approx(total, abs=1e-12)
    for name, estimate in found.metrics.items():
        assert estimate.low is not None and estimate.high is not None, name
        assert estimate.low < estimate.value < estimate.high, name
    assert sum(bar.count for bar in found.bins) == 300


def test_f1_and_matthews_are_scikit_learns_where_the_task_is_scored_by_them() -> None:
    samples = choice_samples(120, 1, seed=2, metrics=("mcc", "f1"), choices=2)
    found, answers = analysed(samples), choice_answers("task", samples)
    picked = answers.loglikelihoods.argmax(axis=1)
    assert found.metrics["mcc"].value == pytest.approx(matthews_corrcoef(answers.gold, picked))
    assert found.metrics["f1"].value == pytest.approx(f1_score(answers.gold, picked))
    assert found.primary == "mcc"  # CoLA: lm-eval scores no accuracy
    assert analysed(choice_samples(30, 1, seed=2, metrics=("acc", "f1"), choices=2)).primary == "acc"
    assert "f1" not in analysed(choice_samples(30, 1, seed=2, metrics=("acc",), choices=2)).metrics


def test_f1_of_three_choices_is_lm_evals_though_few_documents_show_only_two() -> None:
    """CommitmentBank's is a mean over three classes, also where a limit leaves documents of two."""
    samples = [choice_sample(n, -np.ones((1, 3)) + np.eye(3)[n % 2], n % 2, ("acc", "f1")) for n in range(8)]
    assert "f1" not in analysed(samples).metrics


def test_overconfident_members_are_found_out_and_a_temperature_mends_them() -> None:
    found = analysed(choice_samples(800, 2, seed=3, sharpness=4))
    assert found.temperature is not None and found.ece is not None
    assert min(found.temperature.folds) > 1.5
    assert found.metrics["calibrated_nll"].value < found.metrics["nll"].value
    assert found.ece.p_value == pytest.approx(1 / (1 + DRAWS))
    assert found.ece.value > found.ece.band_high
    assert (found.metrics["overconfidence"].low or 0) > 0


@pytest.mark.parametrize("right", [True, False])
def test_answers_all_right_or_all_wrong(right: bool) -> None:
    samples = [choice_sample(number, np.log([[0.6, 0.3]]) - number, gold=0 if right else 1) for number in range(9)]
    found = analysed(samples)
    assert found.metrics["acc"].value == right
    assert found.metrics["acc"].interval == "Wilson"
    assert "auroc" not in found.metrics
    assert any(f"All answers are {'right' if right else 'wrong'}" in note for note in found.notes)
    assert found.metrics["aurc"].value == (not right)
    assert found.metrics["nll"].low is None and found.metrics["nll"].interval == ""  # alike in all documents


def test_one_document() -> None:
    found = analysed([choice_sample(0, np.log([[0.6, 0.3]]), gold=0)])
    assert found.metrics["acc"].value == 1
    assert "calibrated_nll" not in found.metrics and found.temperature is None
    assert any("calibrated_nll is left out" in note for note in found.notes)
    assert found.ece is not None and found.ece.value == pytest.approx(1 / 3)
    assert found.risk_coverage == [(1.0, 0.0)]


def test_shortened_prompts_are_counted() -> None:
    notes = analysed(choice_samples(20, 2, seed=4)).notes
    assert any(note.startswith("1 of 20 prompts were longer") for note in notes)
    assert not any("longer" in note for note in analysed(choice_samples(20, 2, seed=4, records=False)).notes)


def test_mistakes_are_the_surest_wrong_answers() -> None:
    samples = choice_samples(200, 1, seed=5)
    found, answers = analysed(samples), choice_answers("task", samples)
    confidences = softmax(answers.loglikelihoods, axis=1).max(axis=1)
    expected = sorted(confidences[~answers.correct], reverse=True)[:20]
    assert [mistake.confidence for mistake in found.mistakes] == pytest.approx(expected)
    assert all(mistake.answer != mistake.target for mistake in found.mistakes)
    assert all(mistake.answer in mistake.choices for mistake in found.mistakes)


def test_what_cannot_be_is_refused() -> None:
    samples = choice_samples(5, 2, seed=6)
    samples[3]["acc"] = 1 - samples[3]["acc"]
    with pytest.raises(ValueError, match="document 3 has acc"):
        analysed(samples)
    for value in (float("nan"), float("inf")):
        samples = choice_samples(5, 2, seed=6, records=False)
        samples[2]["filtered_resps"][1] = (value, False)
        with pytest.raises(ValueError, match="document 2 has a log-likelihood that is not finite"):
            analysed(samples)
    samples = choice_samples(5, 2, seed=6, records=False)
    samples[4]["filtered_resps"] = []
    with pytest.raises(ValueError, match=r"document 4 has 0 log-likelihoods for [2-4] choices"):
        analysed(samples)
    samples = choice_samples(5, 2, seed=6, fewer=False)
    samples[0]["lora_dropout"]["gold"] = 4
    with pytest.raises(ValueError, match=r"4 log-likelihoods for 4 choices, of which number 4 \(from 0\) is right"):
        analysed(samples)
    samples = choice_samples(5, 2, seed=6)
    samples[1]["lora_dropout"]["requests"][0]["running"][-1] += 0.1
    with pytest.raises(ValueError, match="document 1: the last running log-likelihood differs"):
        analysed(samples)
    samples = choice_samples(5, 2, seed=6)
    with pytest.raises(ValueError, match="occurs twice"):
        analysed([*samples, samples[0]])


# Members


def test_the_gap_may_be_negative_for_choices_though_it_is_not_for_tokens() -> None:
    # Member 1 spends 1 % of its probability on the choices, and of that 9 in 10 on the right one; member 2 spends 90 %,
    # and of that 1 in 3. The mean of the probabilities listens to member 2 alone: 0.1545 against 0.3005.
    members = np.log([[0.009, 0.001], [0.3, 0.6]])
    found = analysed([choice_sample(number, members, gold=0) for number in range(3)]).jensen
    assert found is not None
    assert found.choice_level == pytest.approx(-np.log([0.9, 1 / 3]).mean() + np.log(0.1545 / 0.455))
    assert found.choice_level < -0.4
    by_choice = np.log(np.exp(members).mean(axis=0)) - members.mean(axis=0)
    assert (by_choice > 0).all()
    assert found.per_token == pytest.approx(by_choice.mean())
    assert found.least >= 0


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_curves_begin_with_member_1_and_end_in_the_run(members: int, documents: int, seed: int) -> None:
    samples = choice_samples(documents, members, seed)
    found = analysed(samples)
    assert [point.members for point in found.curve] == list(range(1, members + 1))
    assert found.ece is not None
    last = found.curve[-1].scores
    for name, value in last.items():
        assert value == (found.ece.value if name == "ece" else pytest.approx(found.metrics[name].value, rel=1e-12))
    assert set(last) == {*found.metrics, "ece"}
    first = analysed([_of_member_1(sample, seed) for sample in samples])
    for name, value in found.curve[0].scores.items():
        expected = first.ece.value if name == "ece" and first.ece else first.metrics[name].value
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def _of_member_1(sample: dict[str, Any], seed: int) -> dict[str, Any]:
    """The run of the first member alone."""
    alone = [record["members"][0] for record in sample["lora_dropout"]["requests"]]
    return choice_sample(sample["doc_id"], np.array([alone]), sample["lora_dropout"]["gold"], seed=str(seed))


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_the_order_of_documents_does_not_matter(documents: int, seed: int, clustered: bool) -> None:
    samples = choice_samples(documents, 2, seed, clusters=5 if clustered else None)
    order = np.random.default_rng(seed).permutation(documents)
    assert analysed([samples[place] for place in order]) == analysed(samples)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_entropies_and_gaps_do_not_depend_on_the_order_of_members(documents: int, seed: int) -> None:
    samples = choice_samples(documents, 4, seed)
    found = analysed(samples)
    for sample in samples:
        for record in sample["lora_dropout"]["requests"]:
            record["members"] = record["members"][::-1]
    again = analysed(samples)
    assert found.entropy is not None and again.entropy is not None and found.jensen is not None
    assert again.jensen is not None
    assert again.entropy.mutual_information == pytest.approx(found.entropy.mutual_information, abs=1e-12)
    assert found.entropy.total == pytest.approx(found.entropy.expected + found.entropy.mutual_information)
    assert again.jensen.per_token == pytest.approx(found.jensen.per_token)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_an_analysis_survives_json(documents: int, members: int, seed: int) -> None:
    found = analysed(choice_samples(documents, members, seed, metrics=("acc", "acc_norm", "f1", "mcc"), choices=2))
    assert TaskAnalysis.model_validate_json(found.model_dump_json()) == found


# Several tasks


def test_groups_count_documents_within_subjects() -> None:
    samples = {f"subject_{n}": choice_samples(20 + n, 2, seed=n, choices=2 + n) for n in range(3)}
    results = {
        "group_subtasks": {"group": ["part", "subject_2"], "part": ["subject_0", "subject_1"]},
        "results": {"group": {"acc,none": 0.123}},
        "higher_is_better": {},
    }
    found = analyse(samples, results, DRAWS)
    assert list(found) == ["subject_0", "subject_1", "subject_2", "group", "part"]  # the group holds all: no overall
    group = found["group"]
    assert (group.documents, group.strata, group.clusters) == (63, 3, 63)
    rights = [sample["acc"] for of_subject in samples.values() for sample in of_subject]
    assert group.metrics["acc"].value == pytest.approx(np.mean(rights))
    assert "within strata" in group.metrics["acc"].interval
    nll = sum(found[name].metrics["nll"].value * found[name].documents for name in samples) / 63
    assert group.metrics["nll"].value == pytest.approx(nll)
    assert any("counts all documents alike" in note for note in group.notes)
    assert group.sampled_subjects == {}
    wrong = {(name, sample["doc_id"]) for name, rows in samples.items() for sample in rows if not sample["acc"]}
    assert {(mistake.task, mistake.doc_id) for mistake in group.mistakes} <= wrong
    assert len(group.curve) == 2
    assert group.jensen is not None


def test_twenty_subjects_are_resampled_as_a_sensitivity() -> None:
    # one half of the subjects is answered right, one half wrong: which subjects were asked is all that matters
    samples = {
        f"subject_{n}": [choice_sample(number, np.log([[0.6, 0.2]]), gold=n % 2, seed=str(n)) for number in range(10)]
        for n in range(20)
    }
    found = analyse(samples, {"group_subtasks": {"group": list(samples)}}, DRAWS)["group"]
    assert set(found.sampled_subjects) == {"acc", "nll"}
    sensitive = found.sampled_subjects["acc"]
    assert "whole strata" in sensitive.interval
    assert sensitive.low is not None and sensitive.high is not None
    assert sensitive.high - sensitive.low > 0.3
    assert found.metrics["acc"].low is None  # within subjects nothing varies


def test_overall_is_of_all_choice_tasks() -> None:
    samples = {"a": choice_samples(10, 2, seed=1), "b": choice_samples(15, 2, seed=2, clusters=3)}
    found = analyse(samples, {}, DRAWS)[OVERALL]
    assert (found.documents, found.strata, found.clusters) == (25, 2, 13)
    assert OVERALL not in analyse({"a": samples["a"]}, {}, DRAWS)


def test_groups_with_other_kinds_are_left_out() -> None:
    subtasks = {"mixed": ["a", "text"], "choices": ["a", "b"], "alone": ["a"], "a": []}
    assert groups_of(subtasks, ["a", "b"], ["a", "b", "text"]) == {"choices": ["a", "b"]}


def test_joined_tasks_keep_their_documents_apart() -> None:
    parts = [choice_answers(str(n), choice_samples(6, 2, seed=n, choices=2 + n, clusters=2)) for n in range(3)]
    together = joined_choices("all", parts)
    assert together.loglikelihoods.shape == (18, 4)
    assert together.strata.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert len(set(together.clusters)) == 6
    for number, part in enumerate(parts):
        own = slice(6 * number, 6 * number + 6)
        width = part.loglikelihoods.shape[1]
        assert np.array_equal(together.members[:, own, :width], part.members)
        assert np.isneginf(together.members[:, own, width:]).all()


# Other shapes of samples


def test_the_unconditional_half_of_mutual_information_is_no_choice() -> None:
    samples = choice_samples(12, 2, seed=8, metrics=("acc",))
    plain = analysed(samples)
    for sample in samples:
        unconditional = [("", continuation) for _, continuation in sample["arguments"]]
        sample["arguments"] = [*sample["arguments"], *unconditional]
        sample["filtered_resps"] = [*sample["filtered_resps"], *[(-1.0, False)] * len(unconditional)]
        sample["lora_dropout"]["requests"] *= 2
        sample["metrics"] = ["acc", "acc_mutual_info"]
        sample["acc_mutual_info"] = 1.0
    found = analysed(samples)
    assert found.metrics["nll"] == plain.metrics["nll"]
    assert found.metrics["acc_mutual_info"].value == 1


def test_choices_that_differ_in_the_prompt_are_told_by_it() -> None:
    samples = choice_samples(3, 1, seed=9)
    for sample in samples:
        sample["arguments"] = [(f"{text} sat", " down") for _, text in sample["arguments"]]
    answers = choice_answers("task", samples)
    assert answers.choices[0][:2] == ("choice 0 sat", "choice 1 sat")


def test_several_right_choices_are_scored_by_lm_eval_alone() -> None:
    samples = choice_samples(12, 2, seed=10)
    for sample in samples:
        sample["lora_dropout"]["gold"] = None
    found = analysed(samples, results={"task": {"acc,none": np.mean([sample["acc"] for sample in samples])}})
    assert (found.kind, found.primary, found.ece) == ("other", "acc", None)
    assert found.metrics["acc"].interval == "Wilson"
    assert any("not scored by one right choice" in note for note in found.notes)


def test_an_accuracy_that_is_a_share_of_probability_is_lm_evals() -> None:
    samples = choice_samples(12, 2, seed=10)
    for sample in samples:
        sample["acc"] = 0.3 + 0.01 * sample["doc_id"]
    found = analysed(samples)
    assert (found.kind, found.primary) == ("other", "acc")
    assert found.metrics["acc"].value == pytest.approx(0.3 + 0.055)
    assert "bootstrap" in found.metrics["acc"].interval


def test_a_score_that_is_no_mean_is_left_to_lm_eval() -> None:
    samples = choice_samples(12, 2, seed=11, metrics=("acc", "acc_norm"))
    found = analysed(samples, results={"task": {"acc_norm,none": 17.0}})
    assert "acc_norm" not in found.metrics
    assert any("acc_norm is no mean" in note for note in found.notes)


# Generation


@pytest.mark.parametrize(
    ("text", "starts", "answer", "token"),
    [
        ("7 and 5 are 12", [0, 1, 5, 7, 11], "12", 4),
        ("7 and 5 are 12", [0, 1, 5, 7, 11], "7", 0),
        ("12 is 12.", [0, 2, 5, 8], "12", 2),  # the last occurrence
        ("no answer", [0, 2], "[invalid]", 0),  # not in the text
        ("ab\u00e9cd", [0, 2, 2, 3], "\u00e9c", 1),  # two tokens for one character
        ("  yes", [0, 2], " yes ", 1),
    ],
)
def test_the_first_token_of_the_answer(text: str, starts: list[int], answer: str, token: int) -> None:
    logprobs = [-0.1 * (place + 1) for place in range(len(starts))]
    sample = generation_sample(0, text, answer, right=True, logprobs=logprobs, starts=starts)
    found = answers_of("task", [sample])
    assert isinstance(found, GeneratedAnswers)
    assert found.confidence_first_answer_token["none"][0] == pytest.approx(np.exp(logprobs[token]))
    assert found.confidence_length_normalised[0] == pytest.approx(np.exp(np.mean(logprobs)))


def test_confidence_in_texts_by_hand() -> None:
    logprobs = [np.log([0.9, 0.4]), np.log([0.5, 0.5]), np.log([0.8, 0.2])]
    samples = [
        generation_sample(n, "a b", "b", right=n == 1, logprobs=list(values), starts=[0, 2])
        for n, values in enumerate(logprobs)
    ]
    found = analysed(samples)
    assert found.metrics["exact_match,none"].value == pytest.approx(1 / 3)
    assert found.metrics["exact_match,none"].interval == "Wilson"
    lengths = np.sqrt([0.36, 0.25, 0.16])
    assert found.metrics["overconfidence"].value == pytest.approx(lengths.mean() - 1 / 3)
    first = found.confidences["first_answer_token,none"]
    assert first.metrics["overconfidence"].value == pytest.approx((0.4 + 0.5 + 0.2) / 3 - 1 / 3)
    assert first.metrics["auroc"].value == 1
    assert found.metrics["auroc"].value == 0.5
    assert [mistake.doc_id for mistake in found.mistakes] == [0, 2]


def test_empty_texts_have_no_confidence() -> None:
    samples = [
        generation_sample(0, "a", "a", right=True, logprobs=[-0.5], starts=[0]),
        generation_sample(1, "", "", right=False, logprobs=[], starts=[]),
        generation_sample(2, "b", "b", right=False, logprobs=[-0.2], starts=[0]),
    ]
    found = analysed(samples)
    assert found.metrics["exact_match,none"].value == pytest.approx(1 / 3)
    assert found.metrics["overconfidence"].value == pytest.approx(np.exp([-0.5, -0.2]).mean() - 0.5)
    assert [mistake.doc_id for mistake in found.mistakes] == [2]
    assert any(note.startswith("1 texts are empty") for note in found.notes)
    assert TaskAnalysis.model_validate_json(found.model_dump_json()) == found


def test_answers_know_their_kind() -> None:
    assert isinstance(answers_of("task", choice_samples(2, 1, seed=0)), ChoiceAnswers)
    with pytest.raises(ValueError, match="no documents"):
        answers_of("task", [])
