"""Comparisons: closed forms, references, and equal numbers in JSON, Markdown, HTML and on the terminal."""

from __future__ import annotations

import html
import json
import re
from itertools import product
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import answered, choice_samples, text_samples, word_samples, write_run
from scipy.stats import ttest_rel
from sklearn.metrics import matthews_corrcoef

from eval.compare import words
from eval.compare.run import Declared, compare_adapters, compare_masks, compare_methods
from eval.compare.schema import Comparison
from pipeline.errors import UserError


def read(folder: Path) -> Comparison:
    return Comparison.model_validate_json((folder / "comparison.json").read_text())


def flat(text: str) -> str:
    """With plain spaces only."""
    return " ".join(text.split())


def by_task(comparison: Comparison) -> dict[str, Any]:
    return {task.task: task for task in comparison.tasks}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on tasks of every kind; a group of two, and documents that share texts."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model, skill in (("plain", 1, 0.8), ("dropout", 2, 1.6)):
        tasks = {
            "part_a": choice_samples(80, model, skill),
            "part_b": choice_samples(50, model + 10, skill, salt="<b>bold</b> "),
            "shared": choice_samples(60, model + 20, skill, clusters=12, salt="c "),
            "texts": text_samples(9, model),
            "words": word_samples(30, model),
        }
        write_run(
            folder / name,
            tasks,
            name,
            mask_seed=5 if name == "dropout" else None,
            groups={"both": ["part_a", "part_b"]},
        )
    return folder / "plain", folder / "dropout"


@pytest.fixture(scope="module")
def compared(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare_adapters([str(run) for run in pair], Declared(), tmp_path_factory.mktemp("compared") / "out")


def test_mcnemar_and_flips_by_hand(tmp_path: Path) -> None:
    """Of 40 documents 3 are lost and 9 gained: the mid-p value, the interval and the texts, computed on paper."""
    first = [True] * 20 + [True] * 3 + [False] * 9 + [False] * 8
    second = [True] * 20 + [False] * 3 + [True] * 9 + [False] * 8
    write_run(tmp_path / "a", {"told": answered(first)}, "a")
    write_run(tmp_path / "b", {"told": answered(second, confident=3.0)}, "b")
    out = compare_adapters([str(tmp_path / "a"), str(tmp_path / "b")], Declared(), tmp_path / "out")
    (task,) = read(out).tasks
    found = task.differences[0]
    assert (found.metric, found.first, found.second) == ("acc", 23 / 40, 29 / 40)
    exact = 2 * sum(comb(12, k) for k in range(4)) / 2**12
    assert found.p_value == pytest.approx(exact - comb(12, 3) / 2**12, abs=1e-12)
    assert found.adjusted_p == found.p_value, "a family of one"
    gained, lost = 10 / 42, 4 / 42
    half = 1.959964 * sqrt((gained + lost - (gained - lost) ** 2) / 42)
    assert (found.low, found.high) == pytest.approx((gained - lost - half, gained - lost + half), abs=1e-6)
    assert task.flips is not None
    counts = task.flips.both_right, task.flips.right_to_wrong, task.flips.wrong_to_right, task.flips.both_wrong
    assert counts == (20, 3, 9, 8)
    assert [flip.doc_id for flip in task.flips.lost] == [20, 21, 22]
    assert all(flip.second_answer != flip.target == flip.first_answer for flip in task.flips.lost)
    assert task.flips.lost[0].prompt == "told Question 20?\nAnswer:"
    assert task.flips.lost[0].second_confidence == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert "p = 0.092" in (out / "comparison.md").read_text() or "0.092" in (out / "comparison.md").read_text()


def test_a_run_against_itself_has_no_difference(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    comparison = read(compare_adapters([str(pair[1]), str(pair[1])], Declared(), tmp_path / "out"))
    for task in comparison.tasks:
        assert task.first != task.second, "labels tell the two apart"
        for found in task.differences:
            assert found.difference == 0 and found.p_value in (1.0, None)
        assert task.flips is None or task.flips.right_to_wrong == task.flips.wrong_to_right == 0
        assert task.differences[0].p_value == 1.0
    assert "are the same answers of one evaluation" in comparison.notes[0]
    assert flat(comparison.verdict[0]).endswith("none of 4 tested differences holds at the 5 % level.")
    assert "none of 4 tested differences" in flat(capsys.readouterr().out)


def test_scores_are_those_of_the_runs(pair: tuple[Path, Path], compared: Path) -> None:
    """Every value is the run's own from results.json, and every metric of both runs is there."""
    analyses = [
        next(iter(json.loads((run / "results.json").read_text())["lora_dropout"]["systems"].values()))["analysis"]
        for run in pair
    ]
    for task in read(compared).tasks:
        both = [one[task.task]["metrics"] for one in analyses]
        assert {found.metric for found in task.differences} == both[0].keys() & both[1].keys()
        for found in task.differences:
            values = found.first, found.second
            assert values == pytest.approx([metrics[found.metric]["value"] for metrics in both], abs=1e-12)
            assert found.difference == pytest.approx(values[1] - values[0], abs=1e-15)
        assert not any("ece" in found.metric for found in task.differences), "biased: not compared"


def test_dependent_documents_flip_whole_clusters(pair: tuple[Path, Path], compared: Path) -> None:
    """12 clusters: the p-value is the share of all 2^12 sign patterns that give as large a difference."""
    task = by_task(read(compared))["shared"]
    right = []
    for run, system in zip(pair, ("deterministic", "ensemble"), strict=True):
        lines = (run / f"samples_{system}_shared.jsonl").read_text().splitlines()
        right.append(np.array([json.loads(line)["acc"] for line in lines]))
    sums = np.bincount(np.arange(60) % 12, right[1] - right[0])
    sums = sums[sums != 0]
    patterns = np.array(list(product((-1, 1), repeat=len(sums))))
    as_large = np.abs(patterns @ sums) >= abs(sums.sum()) - 1e-9
    assert task.differences[0].p_value == pytest.approx(as_large.mean(), abs=1e-12)
    assert task.clusters == 12 and "clusters that differ" in task.differences[0].test
    assert "of clusters" in task.differences[0].interval


def test_the_group_is_tested_as_one(pair: tuple[Path, Path], compared: Path) -> None:
    """The parts and all tasks together are exploratory; McNemar counts the discordant documents of both parts."""
    comparison = read(compared)
    tasks = by_task(comparison)
    assert {task.task for task in comparison.tasks if task.in_family} == {"both", "shared", "texts", "words"}
    assert comparison.family is not None and comparison.family.tests == 4
    assert (tasks["both"].documents, tasks["both"].strata) == (130, 2)
    for key in ("right_to_wrong", "wrong_to_right", "both_right"):
        parts = [getattr(tasks[name].flips, key) for name in ("part_a", "part_b")]
        assert getattr(tasks["both"].flips, key) == sum(parts)
    assert {flip.task for flip in tasks["both"].flips.gained} == {"part_a", "part_b"}
    assert tasks["overall"].documents == 190 and not tasks["overall"].in_family
    nll = next(found for found in tasks["both"].differences if found.metric == "nll")
    assert "within strata" in nll.interval and nll.p_value is None and nll.adjusted_p is None
    primaries = [task.differences[0] for task in comparison.tasks if task.in_family]
    ordered = sorted(primaries, key=lambda found: found.p_value)
    holm = np.minimum(np.maximum.accumulate([(4 - k) * found.p_value for k, found in enumerate(ordered)]), 1)
    assert [found.adjusted_p for found in ordered] == pytest.approx(list(holm), abs=1e-15)


def test_paired_bootstrap_of_a_mean(compared: Path, pair: tuple[Path, Path]) -> None:
    """The interval of a mean over independent documents is near the normal one of the documents' differences."""
    task = by_task(read(compared))["part_a"]
    found = next(one for one in task.differences if one.metric == "nll")
    losses = []
    for run, system in zip(pair, ("deterministic", "ensemble"), strict=True):
        rows = [json.loads(line) for line in (run / f"samples_{system}_part_a.jsonl").read_text().splitlines()]
        scores = np.array([[resp[0] for resp in row["filtered_resps"]] for row in rows])
        gold = np.array([row["target"] for row in rows])
        losses.append(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(rows)), gold])
    each = losses[1] - losses[0]
    half = 1.96 * each.std(ddof=1) / sqrt(len(each))
    assert found.difference == pytest.approx(each.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.25 * half)


def cells_of_html(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text, flags=re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]+>", "\n", cell)) for cell in row] for row in cells]


def test_equal_numbers_in_json_markdown_html_and_terminal(compared: Path) -> None:
    comparison = read(compared)
    page = [" ".join("\n".join(row).split()) for row in cells_of_html((compared / "comparison.html").read_text())]
    markdown = (compared / "comparison.md").read_text()
    checked = 0
    for task in comparison.tasks:
        for found in task.differences:
            row = words.task_row(task, found)
            in_markdown = f"| {row.metric} | {row.first} | {row.second} | {row.difference} | {row.interval} |"
            assert in_markdown in markdown
            in_page = " ".join(
                f"{row.metric} {row.how} {row.first} {row.second} {row.difference} {row.interval}".split()
            )
            assert any(in_page in line for line in page), in_page
            checked += 1
            if found.percent:
                assert float(row.difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(
                    100 * found.difference, abs=0.06
                )
    assert checked > 30
    for sentence in comparison.verdict:
        assert html.escape(sentence, quote=False) in (compared / "comparison.html").read_text()
        assert f"**{flat(sentence)}**" in flat(markdown)
    for task in comparison.tasks:
        assert f"{task.documents:,} documents" in markdown


def test_the_page_is_one_file_without_network_and_escapes_texts(compared: Path) -> None:
    page = (compared / "comparison.html").read_text()
    assert not re.search(r"<(script|link|iframe|img|object)|https?://|url\((?!#)|@import", page)
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "<svg" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {file.suffix for file in (compared / "plots").iterdir()} == {".svg", ".png"}


def test_an_override_changes_the_test_and_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    declared = Declared(tasks=["part_a"], primary=["part_a=auroc"])
    comparison = read(compare_adapters([str(run) for run in pair], declared, tmp_path / "auroc"))
    (task,) = comparison.tasks
    assert task.in_family, "asked for by name"
    assert task.differences[0].metric == "auroc" and "swapped answers" in task.differences[0].test
    assert "that differ" not in task.differences[0].test, "all documents are swapped, equal ones too"
    assert comparison.family is not None and "Stated by --primary: part_a=auroc" in comparison.family.rule
    assert comparison.detectable == [], "a statement about accuracies only"
    accuracy = next(found for found in task.differences if found.metric == "acc")
    assert accuracy.p_value is not None and accuracy.adjusted_p is None, "exploratory"
    declared = Declared(tasks=["part_a"], primary=["part_a=nll"])
    nll = read(compare_adapters([str(run) for run in pair], declared, tmp_path / "nll")).tasks[0].differences[0]
    assert nll.test.startswith("sign flips of the 80 documents") and nll.adjusted_p == nll.p_value


def test_matthews_correlation_is_tested_by_swapping(tmp_path: Path) -> None:
    """A task that lm-eval scores by Matthews correlation only, with 7 documents: all swaps of the answers by hand."""
    picks = [[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 0]]
    golds = []
    for name, picked in zip("ab", picks, strict=True):
        samples = choice_samples(7, 0, choices=2)
        golds = [one["target"] for one in samples]
        for one, pick in zip(samples, picked, strict=True):
            one["filtered_resps"] = [[-1.0 if place == pick else -2.0, False] for place in range(2)]
            one["metrics"] = ["mcc"]
            one["mcc"] = [one["target"], pick]
            del one["acc"]
        write_run(tmp_path / name, {"cola": samples}, name)
    found = read(
        compare_adapters([str(tmp_path / "a"), str(tmp_path / "b")], Declared(primary=["cola=mcc"]), tmp_path / "out")
    )
    difference = found.tasks[0].differences[0]
    both = np.array(picks)

    def gap(swapped: np.ndarray) -> float:
        first, second = np.where(swapped, both[::-1], both)
        return matthews_corrcoef(golds, second) - matthews_corrcoef(golds, first)

    observed = gap(np.zeros(7, dtype=bool))
    assert difference.difference == pytest.approx(observed, abs=1e-12)
    all_gaps = np.array([gap(np.array(pattern)) for pattern in product((False, True), repeat=7)])
    assert difference.p_value == pytest.approx(np.mean(np.abs(all_gaps) >= abs(observed) - 1e-12), abs=1e-12)


def test_detectable_differences(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [str(run) for run in pair]
    supposed = read(compare_adapters(runs, Declared(tasks=["part_a"]), tmp_path / "1")).detectable
    assert [one.discordance for one in supposed] == [0.05, 0.1, 0.2]
    for one in supposed:
        effect = 2.8 * sqrt(one.discordance / 80)
        assert one.effect == pytest.approx(effect, rel=1e-3) if effect <= one.discordance else one.effect is None
    stated = read(compare_adapters(runs, Declared(tasks=["part_a"], discordance=0.3), tmp_path / "2")).detectable
    assert [(one.source, one.effect) for one in stated] == [("stated", pytest.approx(2.8 * sqrt(0.3 / 80), rel=1e-3))]
    pilots = [[True] * 30 + [False] * 10, [True] * 24 + [False] * 16]
    for name, right in zip("ab", pilots, strict=True):
        write_run(tmp_path / f"pilot-{name}", {"part_a": answered(right)}, name)
    declared = Declared(tasks=["part_a"], pilot=(str(tmp_path / "pilot-a"), str(tmp_path / "pilot-b")))
    (measured,) = read(compare_adapters(runs, declared, tmp_path / "3")).detectable
    assert (measured.source, measured.discordance) == ("pilot", pytest.approx(6 / 40))
    write_run(tmp_path / "pilot-c", {"part_a": choice_samples(40, 3, 0.6)}, "c")
    declared = Declared(tasks=["part_a"], pilot=(str(tmp_path / "pilot-a"), str(tmp_path / "pilot-c")))
    with pytest.raises(UserError, match="answered other documents or prompts of part_a"):
        compare_adapters(runs, declared, tmp_path / "never")
    shared = read(compare_adapters(runs, Declared(tasks=["shared"], discordance=0.5), tmp_path / "4"))
    assert not shared.detectable[0].independent and "at least" in (tmp_path / "4" / "comparison.md").read_text()


def test_methods_over_paired_seeds(tmp_path: Path, capsys: Any) -> None:
    """Student's t over the differences of five seeds, whatever order the runs are found in."""
    for seed in (4, 0, 3, 1, 2):
        write_run(tmp_path / f"lora-{seed}", {"easy": choice_samples(90, seed, 0.6)}, "lora", seed)
        write_run(tmp_path / f"drop-{9 - seed}", {"easy": choice_samples(90, 50 + seed, 1.3)}, "drop", seed)
    methods = [f"lora={tmp_path}/lora-*", f"drop={tmp_path}/drop-*:deterministic"]
    comparison = read(compare_methods(methods, Declared(), tmp_path / "out"))
    primary = comparison.method_differences[0]
    values = {
        method: [
            json.loads((tmp_path / f"{method}-{9 - seed if method == 'drop' else seed}" / "results.json").read_text())[
                "lora_dropout"
            ]["systems"]["deterministic"]["analysis"]["easy"]["metrics"]["acc"]["value"]
            for seed in range(5)
        ]
        for method in ("lora", "drop")
    }
    reference = ttest_rel(values["drop"], values["lora"])
    ends = reference.confidence_interval()
    assert [one.seed for one in primary.seeds] == [0, 1, 2, 3, 4]
    assert [(one.first, one.second) for one in primary.seeds] == list(zip(values["lora"], values["drop"], strict=True))
    assert primary.p_value == pytest.approx(reference.pvalue, rel=1e-9) and primary.adjusted_p == primary.p_value
    assert (primary.low, primary.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    others = [one for one in comparison.method_differences if not one.primary]
    assert others and all(one.adjusted_p is None for one in others)
    for text in ((tmp_path / "out" / "comparison.md").read_text(), (tmp_path / "out" / "comparison.html").read_text()):
        assert words.method_row(primary).difference in text and words.method_row(primary).interval in text
    assert "drop minus lora" in capsys.readouterr().out


def test_noise_over_mask_seeds(tmp_path: Path, capsys: Any) -> None:
    runs = [
        str(write_run(tmp_path / f"m{seed}", {"easy": choice_samples(70, seed, 1.0)}, "m", mask_seed=seed))
        for seed in (3, 1, 2)
    ]
    comparison = read(compare_masks(runs, Declared(), tmp_path / "out"))
    accuracy = comparison.mask_noise[0]
    assert accuracy.primary and len(accuracy.scores) == 3
    assert accuracy.deviation == pytest.approx(np.std(accuracy.scores, ddof=1), rel=1e-12)
    assert [run.mask_seed for run in comparison.runs] == [3, 1, 2]
    shown = words.noise_texts(accuracy)
    for text in (
        *((tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("md", "html")),
        capsys.readouterr().out,
    ):
        assert shown[2] in text and shown[3] in text and shown[4] in text
