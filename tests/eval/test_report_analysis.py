"""The report of an analysed run: the same numbers everywhere, honest verdicts, pictures as files, and odd cases."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_analyses import SIMULATED, choice_analysis
from report_page import Page, pictures, plain
from report_results import analysed_results, synthetic_results, write_results
from rich.console import Console

from eval.analysis.schema import Bin, CalibrationError, Estimate, TaskAnalysis
from eval.report import write_report
from eval.report.mistakes import MOST_BYTES
from eval.report.pictures.reliability import calibrated_range
from eval.report.verdict import calibration_sentences, score_sentences, temperature_sentences
from eval.score_table import score_table
from eval.scores import Score, ScoreRow, read_analyses, score_rows
from pipeline.errors import UserError

LABELS = {"base": "base", "deterministic": "deterministic adapter", "ensemble": "ensemble of 8"}
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of task and three systems, with its report."""
    folder = write_results(tmp_path_factory.mktemp("analysed") / "run", analysed_results())
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def texts(run_folder: Path) -> tuple[str, str]:
    return (run_folder / "report.html").read_text("utf-8"), (run_folder / "report.md").read_text("utf-8")


def lines_of(markdown: str) -> list[str]:
    return [plain(line) for line in markdown.splitlines()]


def written(folder: Path, results: dict) -> tuple[str, str]:
    """(HTML, Markdown) of the report of some results."""
    write_report(write_results(folder, results))
    return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")


def test_every_cell_of_the_page_is_in_the_markdown(texts: tuple[str, str]) -> None:
    html, markdown = texts
    brackets = str.maketrans("", "", "()")
    shown = plain(markdown).translate(brackets)
    found = [plain(cell).translate(brackets) for cell in Page(html).cells]
    cells = [cell for cell in found if re.search(r"\d", cell) and "documents" not in cell]
    assert len(cells) > 400
    missing = [cell for cell in cells if cell not in shown]
    assert not missing, missing[:10]


def test_every_score_of_the_analysis_is_printed_as_it_is_in_the_results(texts: tuple[str, str]) -> None:
    _, markdown = texts
    results = analysed_results()
    rows = {(row.task, row.key): row for row in score_rows(results)}
    lines = [line.split(" | ") for line in lines_of(markdown)]
    table = {(line[0].lstrip("| "), line[1]): line[3:] for line in lines if len(line) == 6}
    checked = 0
    for (task, _), row in rows.items():
        if row.subtask and not row.primary:
            continue
        arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
        cells = table[task, row.metric + (", %" if row.percent else "") + arrow]
        for cell, system in zip(cells, LABELS, strict=True):
            found = results["lora_dropout"]["systems"][system]["analysis"][task]["metrics"][row.key]
            printed = [float(n) for n in re.findall(r"[-\d.]+", cell.replace(MINUS, "-").rstrip(" |"))]
            digits = len(re.search(r"[\d.]+", cell)[0].partition(".")[2])
            scale = 100 if row.percent else 1
            expected = [scale * found[name] for name in ("value", "low", "high")]
            assert printed == pytest.approx(expected, abs=0.5000001 * 10**-digits), (task, row.key, cell)
            checked += 1
    assert checked > 100


def test_calibration_errors_have_a_band_and_a_p_value_and_no_interval(texts: tuple[str, str]) -> None:
    _, markdown = texts
    rows = [line for line in lines_of(markdown) if " ECE, " in line and "|" in line]
    rows = [row for row in rows if row.startswith("| ") and not row.startswith("| members")]
    assert len(rows) == 3 * 5  # in the overview, and both in the section of each task with confidences
    for row in rows:
        for cell in row.strip("| ").split(" | ")[3:]:
            assert re.fullmatch(r"[\d.]+ \(calibrated: [\d.]+ to [\d.]+; p [=<] [\d.]+\)", cell), cell


def test_the_page_is_whole_and_loads_nothing(texts: tuple[str, str]) -> None:
    html, _ = texts
    page = Page(html)
    assert pictures(html) == html.count('<svg class="narrow"') == 2 + 5 * 3 + 1
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert "http" not in html and "@import" not in html
    assert len(html.encode()) < MOST_BYTES / 4


def test_pictures_are_files_too(run_folder: Path) -> None:
    files = {path.name for path in (run_folder / "plots").iterdir()}
    names = {name.rpartition(".")[0] for name in files}
    assert {"scores", "losses", "reliability-sst2", "curves-sst2", "risk-coverage-sst2", "curves-wikitext"} <= names
    assert files == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        assert (run_folder / "plots" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        svg = (run_folder / "plots" / f"{name}.svg").read_text("utf-8")
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "var(--" not in svg
    linked = re.findall(r"\]\(plots/([^)]+)\)", (run_folder / "report.md").read_text("utf-8"))
    assert linked and set(linked) <= files


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    results = analysed_results(("deterministic", "ensemble"), ("rte",))
    for name in ("one", "two"):
        write_report(write_results(tmp_path / name, results))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 3 + 2 * 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_five_systems_are_told_apart(tmp_path: Path) -> None:
    results = analysed_results(tuple(SIMULATED), ("rte",))
    html, markdown = written(tmp_path, results)
    header = "| task | metric | documents | base | deterministic adapter | MC dropout of 8 | deep ensemble of 3 | "
    header += "ensemble of 8 |"
    assert header in markdown
    assert "8 members, average of logits at every token, rate 0.1 on the adapter's input, seed 3" in markdown
    assert "this adapter and outputs/seed-1, outputs/seed-2" in markdown
    assert re.search(
        r"After own temperatures the lowest NLL is (the [a-z ]+ of \d|MC dropout of 8)'s on 1 of 1", markdown
    )
    assert {"var(--base)", "var(--mc-dropout)", "var(--deep-ensemble)", "var(--ensemble)"} <= set(
        re.findall(r"var\(--[a-z-]+\)", html)
    )


@pytest.mark.parametrize("systems", [("base", "deterministic", "ensemble"), tuple(SIMULATED), ("base",)])
def test_the_terminal_table_fits_on_80_columns(systems: tuple[str, ...]) -> None:
    results = analysed_results(systems)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(score_table(results))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    analysis = results["lora_dropout"]["systems"]["base"]["analysis"]["sst2"]
    accuracy, nll = analysis["metrics"]["acc"], analysis["metrics"]["nll"]
    assert f"{100 * accuracy['value']:.1f}" in text and f"{nll['value']:.3f}" in text
    assert f"{100 * analysis['ece']['value']:.1f}" in text


def test_odd_cases_are_told_plainly(tmp_path: Path) -> None:
    results = analysed_results(tasks=("rte",))
    systems = results["lora_dropout"]["systems"]
    for system in systems.values():
        one_class = choice_analysis(9, 40, signal=50.0)
        few = choice_analysis(10, 3)
        assert "auroc" not in one_class["metrics"]  # every answer is right
        one_class["notes"] = ["auroc is left out: every answer is right."]
        system["analysis"] |= {"one_class": one_class, "few": few}
    del systems["base"]["analysis"]["rte"]  # an older part of the run
    systems["ensemble"]["analysis"]["rte"]["notes"] = ["Of the ensemble alone."]
    systems["ensemble"] |= {"kept": 120, "requests": 3000}
    html, markdown = written(tmp_path, results)
    Page(html)
    for text in (plain(Page(html).words), plain(markdown)):
        assert "auroc is left out: every answer is right." in text
        assert "Too few for pictures: they need 20." in text
        assert "ensemble of 8: Of the ensemble alone." in text
        assert "120 of 3,000 (ensemble of 8); their time is not counted" in text
        assert "members took" not in text  # the time of some of its answers is unknown
    assert "reliability-few" not in html and "reliability-one_class" in html and "curves-one_class" not in html
    base = [line.split(" | ")[3] for line in lines_of(markdown) if line.startswith("| rte |")]
    assert base[0].startswith("54.2") and set(base[1:]) <= {"-", base[0]}


def test_a_report_that_would_be_too_large_is_cut_and_says_so(tmp_path: Path) -> None:
    results = analysed_results(("deterministic", "ensemble"), ("rte",))
    for analysis in results["lora_dropout"]["systems"]["ensemble"]["analysis"].values():
        for mistake in analysis["mistakes"]:
            mistake["choices"] = ["Lorem " * 400] * 300
    html, markdown = written(tmp_path, results)
    assert len(html.encode()) <= MOST_BYTES
    for text in (plain(Page(html).words), plain(markdown)):
        assert "This report would exceed 10 MB: it shows at most 20 mistakes per task, 400 characters" in text
        assert "[2,000 characters left out] …" in text


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    results = analysed_results(("deterministic", "ensemble"), ("rte",))
    evil = "</pre><script>alert(1)</script>"
    systems = results["lora_dropout"]["systems"]
    systems["ensemble"]["analysis"]["rte"]["mistakes"][0] |= {"prompt": evil, "answer": evil, "target": evil}
    systems["ensemble"]["analysis"]["rte"]["notes"] = [evil]
    html, markdown = written(tmp_path, results)
    page = Page(html)
    assert "script" not in page.tags and page.words.count(evil) == 4
    assert "<script" not in "\n".join(line for line in markdown.splitlines() if not line.startswith("        "))


def test_an_analysis_of_another_version_is_refused(tmp_path: Path) -> None:
    results = analysed_results(("base",), ("rte",))
    results["lora_dropout"]["systems"]["base"]["analysis"]["rte"]["novelty"] = 1
    with pytest.raises(UserError, match="this version reads others; evaluate again"):
        write_report(write_results(tmp_path, results))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("lora_dropout", "systems", "base", "analysis"), [[1.0]], "this version reads others; evaluate again"),
        (("lora_dropout", "systems", "base", "results"), [[{}]], "systems.base has no object results"),
        (("lora_dropout", "recipe"), None, "this version reads other recipes"),
        (("lora_dropout", "systems"), None, "systems is NoneType, expected an object"),
        (("lora_dropout", "provenance", "training", "seed"), {}, r"training.seed is \{\}, expected a whole number"),
        (("lora_dropout", "ensemble"), None, "ensemble.seed is None, expected a whole number"),
        (("group_subtasks",), None, "group_subtasks is NoneType, expected an object"),
        (("group_subtasks",), {"mmlu": 3}, "group_subtasks.mmlu is 3, expected a list of names"),
        (("group_subtasks",), {"mmlu": [None]}, r"group_subtasks.mmlu is \[None\], expected a list of names"),
        (("group_subtasks",), {"a": ["b", "rte"], "b": ["a"]}, "group_subtasks: [ab] is a part of itself"),
    ],
)
def test_results_of_another_shape_are_refused(tmp_path: Path, place: tuple[str, ...], value: Any, said: str) -> None:
    results = holder = analysed_results(("base", "ensemble"), ("rte",))
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(UserError, match=said):
        write_report(write_results(tmp_path, results))


def test_scores_of_the_analysis_stand_before_those_of_lm_eval() -> None:
    results = synthetic_results()
    totals = score_rows(results)
    systems = results["lora_dropout"]["systems"]
    metrics = {"exact_match,strict": Estimate(value=0.5, low=0.4, high=0.6, interval="bootstrap", percent=True)}
    analysis = TaskAnalysis(
        kind="generation", documents=150, clusters=150, strata=1, primary="exact_match,strict", metrics=metrics
    )
    systems["ensemble"]["analysis"] = {"pocket_reverse": analysis.model_dump()}
    row = next(row for row in score_rows(results) if row.task == "pocket_reverse")
    before = next(row for row in totals if row.task == "pocket_reverse")
    assert row.scores["ensemble"] == Score(0.5, 0.4, 0.6, "bootstrap")
    assert row.scores["base"] == before.scores["base"] and row.primary


def test_a_generation_metric_that_both_name_is_one_row() -> None:
    results = synthetic_results()
    for system in results["lora_dropout"]["systems"].values():
        system["results"] = {"qa": {"exact_match,none": 0.25, "exact_match_stderr,none": 0.1}}
        estimate = Estimate(value=0.25, low=0.1, high=0.5, interval="Wilson", percent=True, higher_is_better=True)
        metrics = {"exact_match,none": estimate}
        analysis = TaskAnalysis(
            kind="generation", documents=8, clusters=8, strata=1, primary="exact_match,none", metrics=metrics
        )
        system["analysis"] = {"qa": analysis.model_dump()}
    rows = score_rows(results)
    assert [(row.metric, row.primary, row.documents) for row in rows] == [("exact match", True, 8)]


def row_of(scores: dict[str, tuple[float, float, float]], higher: bool = True, percent: bool = True) -> ScoreRow:
    return ScoreRow(
        task="sst2",
        key="acc" if percent else "word_perplexity",
        metric="accuracy" if percent else "word perplexity",
        documents=100,
        higher_is_better=higher,
        percent=percent,
        subtask=False,
        primary=True,
        scores={system: Score(*values, "Wilson") for system, values in scores.items()},
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [row_of({"base": (0.5, 0.4, 0.6), "deterministic": (0.71, 0.66, 0.76), "ensemble": (0.7, 0.65, 0.75)})],
            "Deterministic adapter: 71.0 % (66.0 to 76.0) on sst2, 1.0 points above the ensemble of 8's 70.0 %",
        ),
        (
            [row_of({"deterministic": (0.7, 0.65, 0.75), "ensemble": (0.70004, 0.65, 0.75)})],
            "Ensemble of 8: 70.0 % (65.0 to 75.0) on sst2; the deterministic adapter the same, 70.0 %",
        ),
        (
            [row_of({"deterministic": (12.0, 11.5, 12.5), "ensemble": (11.0, 10.5, 11.4)}, False, False)],
            "Ensemble of 8: 11.00 (10.50 to 11.40) word perplexity on sst2, 1.00 below the deterministic adapter's",
        ),
        (
            [
                row_of({"deterministic": (0.7, 0.65, 0.75), "ensemble": (0.8, 0.76, 0.85)}),
                row_of({"deterministic": (0.7, 0.65, 0.75), "ensemble": (0.71, 0.66, 0.76)}),
                row_of({"deterministic": (0.5, 0.4, 0.6), "ensemble": (0.5, 0.4, 0.6)}),
            ],
            "The ensemble of 8 scores best on 2 of 3 tasks, 1 tied; the best interval lies clear of all others on 1 of",
        ),
        (
            [row_of({"deterministic": (12.0, 11.5, 12.5), "ensemble": (11.0, 10.5, 11.4)}, False, False)] * 2,
            "The ensemble of 8 scores best on all 2 tasks; the best interval lies clear of all others on all of them.",
        ),
        ([row_of({})], "No task gave a score."),
    ],
)
def test_verdict_on_scores(rows: list[ScoreRow], words: str) -> None:
    assert words in plain(" ".join(score_sentences(rows, LABELS)))


def analysis_with(nll: float, calibrated: float, p: float = 0.5, bias: float = 0.0) -> TaskAnalysis:
    metrics = {
        "nll": Estimate(value=nll),
        "calibrated_nll": Estimate(value=calibrated),
        "overconfidence": Estimate(value=bias, low=bias - 0.02, high=bias + 0.02, percent=True),
    }
    error = CalibrationError(value=0.05, debiased_squared=0.001, band_low=0.01, band_high=0.04, p_value=p)
    return TaskAnalysis(
        kind="choice",
        documents=50,
        clusters=50,
        strata=1,
        primary="nll",
        metrics=metrics,
        ece=error,
        adaptive_ece=error,
    )


@pytest.mark.parametrize(
    ("single", "ensemble", "words"),
    [
        ((0.526, 0.478), (0.481, 0.480), "What the ensemble gains, a mere temperature gains too."),
        ((0.526, 0.478), (0.481, 0.478), "What the ensemble gains, a mere temperature gains too."),
        ((0.526, 0.478), (0.530, 0.480), "The ensemble does not lower it."),
        (
            (0.526, 0.478),
            (0.481, 0.470),
            "A mere temperature does more than the ensemble alone; the ensemble's lead is 0.045 before and 0.008 after",
        ),
        ((0.526, 0.520), (0.481, 0.470), "The ensemble's lead is 0.045 before and 0.050 after temperatures."),
        ((0.526, 0.520), (0.530, 0.470), "The ensemble lowers it by 0.050, and only after temperatures."),
    ],
)
def test_verdict_on_ensemble_or_temperature(
    single: tuple[float, float], ensemble: tuple[float, float], words: str
) -> None:
    analyses = {"deterministic": {"rte": analysis_with(*single)}, "ensemble": {"rte": analysis_with(*ensemble)}}
    (sentence,) = temperature_sentences(analyses, ["rte"], LABELS)
    assert words in sentence and f"{single[0]:.3f} with the single adapter" in sentence
    assert temperature_sentences({"ensemble": analyses["ensemble"]}, ["rte"], LABELS) == []


def test_verdict_on_temperature_over_many_tasks_counts() -> None:
    pairs = [((0.5, 0.4), (0.45, 0.41)), ((0.5, 0.48), (0.45, 0.44)), ((0.5, 0.48), (0.55, 0.47))]
    analyses = {
        "deterministic": {f"t{n}": analysis_with(*single) for n, (single, _) in enumerate(pairs)},
        "ensemble": {f"t{n}": analysis_with(*several) for n, (_, several) in enumerate(pairs)},
    }
    (sentence,) = temperature_sentences(analyses, ["t0", "t1", "t2"], LABELS)
    assert "lower NLL on 2 of 3 tasks" in sentence and "as well as the ensemble on 2." in sentence
    assert sentence.endswith("still lower on 2.")


def test_verdict_on_calibration_rests_on_the_test() -> None:
    analyses = {
        "base": {"rte": analysis_with(1, 1, p=0.001)},
        "deterministic": {"rte": analysis_with(1, 1, p=0.0004, bias=0.072)},
        "ensemble": {"rte": analysis_with(1, 1, p=0.31, bias=0.011)},
    }
    assert calibration_sentences(analyses, ["rte"], LABELS) == [
        "Calibration: the deterministic adapter is over-confident by 7.2 points (5.2 to 9.2; p < 0.001); "
        "the ensemble of 8 agrees with a calibrated model (p = 0.31)."
    ]
    analyses["ensemble"]["rte"] = analysis_with(1, 1, p=0.01, bias=-0.05)
    assert (
        "under-confident by 5.0 points (3.0 to 7.0; p = 0.010)" in calibration_sentences(analyses, ["rte"], LABELS)[0]
    )
    analyses["ensemble"]["rte"] = analysis_with(1, 1, p=0.01, bias=0.01)
    assert "the ensemble of 8 is not calibrated (p = 0.010)" in calibration_sentences(analyses, ["rte"], LABELS)[0]
    several = {system: {**by_task, "sst2": by_task["rte"]} for system, by_task in analyses.items()}
    assert calibration_sentences(several, ["rte", "sst2"], LABELS) == [
        "Tasks on which perfect calibration is rejected (p < 0.05, each test by itself): 2 of 2 for the deterministic "
        "adapter and 2 of 2 for the ensemble of 8."
    ]


def test_nothing_in_the_report_claims_significance(texts: tuple[str, str]) -> None:
    for text in texts:
        assert "significan" not in text.lower()
        assert "python launch/compare.py RUN:deterministic RUN:ensemble" in text


def test_a_calibrated_models_bins_lie_in_their_range() -> None:
    """Simulation: of calibrated bins of n documents at least 95 % lie inside, as binomial quantiles promise."""
    noise = np.random.default_rng(0)
    for n, confidence in ((7, 0.9), (40, 0.55), (300, 0.73)):
        one = Bin(low=0.5, high=1, count=n, confidence=confidence, accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6)
        low, high = calibrated_range(one)
        accuracies = noise.binomial(n, confidence, size=20_000) / n
        assert 0.95 <= np.mean((accuracies >= low) & (accuracies <= high)) < 0.999  # 20,000 draws: ± 0.002


def test_the_synthetic_analyses_are_of_the_schema() -> None:
    results = json.loads(json.dumps(analysed_results(tuple(SIMULATED))))
    assert {task for by_task in read_analyses(results["lora_dropout"]).values() for task in by_task} >= {"sst2", "mmlu"}
