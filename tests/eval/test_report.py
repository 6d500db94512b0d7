"""The report agrees with results.json, is self-contained, safe, repeatable, and plain where something is missing."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from report_page import Page, pictures, plain
from report_results import history, proportion, synthetic_results, write_results
from rich.console import Console
from scipy.stats import norm

from eval import scores
from eval.numbers import duration
from eval.report import write_report
from eval.report.overfitting import Evaluation, evaluations, loss_sentences, training_loss_sentences
from eval.score_table import score_table
from pipeline.errors import UserError


@pytest.fixture
def written(tmp_path: Path):
    """Writes the report of some results; returns (html, markdown)."""

    def write(results: dict) -> tuple[str, str]:
        folder = write_results(tmp_path / "run", results)
        write_report(folder)
        return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")

    return write


def test_every_score_is_in_both_files(written) -> None:
    results = synthetic_results()
    html, markdown = written(results)
    for system in results["lora_dropout"]["systems"].values():
        for found in system["results"].values():
            metric = "acc" if "acc,none" in found else "exact_match"
            key, stderr = (k for k in found if k.startswith(metric))
            value, spread = f"{100 * found[key]:.1f}", found[stderr]
            assert value in plain(Page(html).words)
            assert re.search(rf"\| {value} \([\d.]+ to [\d.]+\) \|", plain(markdown)), (value, spread)


def test_verdict_in_title_and_heading(written) -> None:
    html, markdown = written(synthetic_results())
    first = "No system's interval lies clear of all others' on any task; the ensemble of 8 scores best on all 3 tasks."
    second = (
        "Ensemble of 8: 71.2 % (68.3 to 73.9) on pocket_sentiment, 1.3 points above the deterministic adapter's "
        "69.9 % (67.0 to 72.7)."
    )
    assert plain(re.search("<title>(.*)</title>", html)[1].replace("&#39;", "'")) == f"pocket-example: {first}"
    assert f"**{first}**" in plain(markdown)
    assert second in plain(markdown) and second in plain(Page(html).words)
    last = [line for line in history() if "validation_loss" in line][-1]
    gap = last["validation_loss"] - last["probe_loss"]
    expected = f"Validation loss {last['validation_loss']:.3f} nats per token after 300 steps, +{gap:.3f} against"
    assert expected in plain(markdown)


def test_settings_cost_and_provenance(written) -> None:
    html, markdown = written(synthetic_results())
    for text in (plain(Page(html).words), plain(markdown)):
        for expected in (
            "8 members, average of logits at every token, mask seed 7",
            "2, each example draws its own masks",
            "4-bit nf4",
            "8 members took 3.85 times as long",
            "1 min 28 s",
            "0123abc",
            64 * "a",
            "torch 2.13.0",
            "launch/sft.py recipes/pocket/example.yaml",
            "2026-11-22T09:04:02+00:00",
            "Training took 4 min 02 s.",
        ):
            assert expected in text


def test_rank_and_alpha_are_the_adapters_own(written) -> None:
    results = synthetic_results()
    settings, adapter = results["lora_dropout"]["adapter_settings"], results["lora_dropout"]["recipe"]["adapter"]
    assert settings["r"] != adapter["rank"] and settings["alpha"] != adapter["alpha"]
    assert "| Rank, alpha | 12, 24 |" in written(results)[1]
    settings |= {"rescale": False, "lora_alpha": 6.0}
    assert "| Rank, alpha | 12, 24 (6 in adapter_config.json) |" in written(results)[1]


def test_scores_on_the_terminal() -> None:
    results = synthetic_results()
    systems = results["lora_dropout"]["systems"]
    for system in systems.values():
        system["results"]["wikitext"] = {"word_perplexity,none": 12.3456}
    results["higher_is_better"]["wikitext"] = {"word_perplexity": False}
    del systems["deterministic"]["results"]["pocket_reverse"]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(score_table(results))
    shown = plain(console.export_text())
    assert "task metric n base deterministic ensemble" in shown
    assert "pocket_sentiment accuracy, % ↑ 1000 33.1 ± 2.9 69.9 ± 2.8 71.2 ± 2.8 pocket_capitals" in shown
    assert "pocket_reverse exact match (strict), % ↑ 150 0.0 ± 1.2 47.3 ± 7.9 wikitext" in shown
    assert "wikitext word perplexity ↓ 12.35 12.35 12.35 ±" in shown
    del systems["base"], systems["ensemble"]
    console.print(score_table(results))
    assert "base" not in console.export_text()


def test_page_is_well_formed_and_loads_nothing(written) -> None:
    html, _ = written(synthetic_results())
    page = Page(html)
    assert pictures(html) == html.count('<svg class="narrow"') == 2
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert "http" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))


def test_equal_input_gives_equal_bytes(written) -> None:
    assert written(synthetic_results()) == written(synthetic_results())


def test_hostile_text_stays_text(written) -> None:
    task, evil = "<script>alert(1)</script>|$x$", '"><img src=x onerror=alert(1)>{{ 7*7 }}'
    text = json.dumps(synthetic_results()).replace("pocket_sentiment", task)
    results = json.loads(text)
    ours = results["lora_dropout"]
    ours["recipe"]["base"]["model"] = ours["adapter"] = evil
    ours["provenance"]["training"]["command"] = evil
    html, markdown = written(results)
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert task in page.words and evil in page.words
    assert "<script" not in markdown.split("### The resolved recipe")[0]
    row = next(line for line in markdown.splitlines() if line.startswith("| &lt;script>"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7  # the bar in the task's name makes no further column


def test_no_ensemble_no_history_no_adapter(written) -> None:
    results = synthetic_results()
    ours = results["lora_dropout"]
    ours["systems"] = {"base": ours["systems"]["base"]}
    ours |= {"ensemble": None, "adapter": None, "adapter_settings": None, "history": [], "provenance": {}}
    html, markdown = written(results)
    assert pictures(html) == 1
    for text in (plain(Page(html).words), plain(markdown)):
        assert "Base: 33.1 % (30.3 to 36.1) on pocket_sentiment." in text
        assert "No adapter was given: these are scores of the base model." in text
        assert "No training history came with this adapter" in text
        assert "members took" not in text


def test_rate_zero_says_why_there_is_no_ensemble(written) -> None:
    results = synthetic_results()
    ours = results["lora_dropout"]
    del ours["systems"]["ensemble"]
    ours["adapter_settings"]["rate"], ours["ensemble"] = 0.0, None
    _, markdown = written(results)
    assert "No ensemble was evaluated: the adapter was trained without LoRA Dropout (rate 0)." in markdown


def test_limit_is_said_first(written) -> None:
    results = synthetic_results()
    results["lora_dropout"]["limit"] = 200
    for text in written(results):
        assert "eval.limit" not in text.split("Scores")[0]  # no task has more
    results["n-samples"]["pocket_sentiment"] = {"original": 1000, "effective": 200}
    for text in written(results):
        words = "First 200 documents only (eval.limit) of pocket_sentiment (of 1,000): a trial"
        assert words in text.split("Scores")[0]


def test_history_without_validation_or_with_a_broken_loss(written) -> None:
    results = synthetic_results()
    lines = [line for line in results["lora_dropout"]["history"] if "loss" in line]
    lines[-1]["loss"] = float("nan")
    results["lora_dropout"]["history"] = lines
    html, markdown = written(results)
    assert pictures(html) == 2
    assert "No validation rows were held out" in markdown and "not a finite number at step 300" in markdown
    assert "validation</text>" not in html.replace("\n", "")


def test_metrics_without_stderr_and_other_units(written) -> None:
    results = synthetic_results()
    for number, system in enumerate(results["lora_dropout"]["systems"].values()):
        system["results"] = {
            "wikitext": {
                "alias": "wikitext",
                "word_perplexity,none": 12.3456 - number,
                "word_perplexity_stderr,none": "N/A",
            }
        }
    results["n-samples"] = {"wikitext": {"original": 62, "effective": 62}}
    results["higher_is_better"] = {"wikitext": {"word_perplexity": False}}
    html, markdown = written(results)
    assert "| wikitext | word perplexity ↓ | 62 | 12.35 | 11.35 | 10.35 |" in markdown
    assert "No standard errors were recorded" in markdown
    assert pictures(html) == 1  # losses only: a perplexity has no place on the percent axis


def test_group_rows_come_first_and_their_parts_apart(written) -> None:
    results = synthetic_results()
    parts = {"mmlu_law": proportion(40, 100), "mmlu_math": proportion(10, 50)}
    total = {"alias": "mmlu", "acc,none": 50 / 150, "acc_stderr,none": 0.038}
    for system in results["lora_dropout"]["systems"].values():
        system["results"] = {"mmlu": total, **parts}
    results["results"] = {"mmlu": total, **parts}
    results["group_subtasks"] = {"mmlu": ["mmlu_law", "mmlu_math"]}
    results["n-samples"] = {
        "mmlu_law": {"original": 100, "effective": 100},
        "mmlu_math": {"original": 50, "effective": 50},
    }
    html, markdown = written(results)
    assert markdown.index("| mmlu |") < markdown.index("### Parts of the groups") < markdown.index("| mmlu_law |")
    assert "| mmlu | accuracy, % | 150 | 33.3 (25.9 to 40.8)" in plain(markdown)
    assert "Parts of the groups (2 rows)" in Page(html).words
    assert "Wilson for shares of right answers over independent documents; normal" in markdown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json here"),
        ("{", "line 1: not JSON"),
        ("[]", "no section lora_dropout.systems"),
        ('{"results": {}}', "no section lora_dropout.systems"),
    ],
)
def test_unusable_folder(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("validation", "probe", "words"),
    [
        (
            [2.0, 1.0, 0.8],
            [2.0, 0.9, 0.7],
            "The last of 3 validation losses is the lowest: this curve shows no overfitting",
        ),
        ([2.0, 1.0, 1.005], [2.0, 0.9, 0.8], "less than 1 % and called level here: this curve shows no overfitting"),
        (
            [2.0, 1.0, 1.3],
            [2.0, 0.9, 0.5],
            "at step 20 and ended 0.300 above that (30 %), while the training probe fell by another "
            "0.400: the shape of overfitting. Stopping near step 20",
        ),
        ([2.0, 1.0, 1.3], [2.0, 0.9, 1.2], "the training probe did not fall meanwhile: not overfitting"),
        ([2.0, 1.0, 1.3], [None, None, None], "Without a training probe the curve does not say"),
        ([1.0], [1.1], "-0.100 against a fixed training probe (the generalisation gap). It is negative where"),
        ([1.0], [0.9], "measured once: one point shows no course"),
    ],
)
def test_words_about_overfitting(validation: list[float], probe: list[float | None], words: str) -> None:
    measured = [Evaluation(10 * n, v, p) for n, (v, p) in enumerate(zip(validation, probe, strict=True), start=1)]
    assert words in " ".join(loss_sentences(measured)).replace("\N{MINUS SIGN}", "-")


def test_wilson_for_proportions_normal_for_the_rest() -> None:
    for right, documents in ((0, 20), (7, 20), (20, 20), (331, 1000)):
        value, stderr = proportion(right, documents).values()
        found = scores.score(value, stderr, documents)
        z = norm.ppf(0.975)  # Wilson 1927: roots of (p - value)^2 = z^2 p (1 - p) / n
        for end in (found.low, found.high):
            assert math.isclose((end - value) ** 2, z**2 * end * (1 - end) / documents, abs_tol=1e-12)
        assert found.interval == "Wilson" and 0 <= found.low <= value <= found.high <= 1
    found = scores.score(0.5, 0.2, 100)  # not the spread of 0/1 values
    assert found.interval == "normal" and math.isclose(found.high, 0.5 + norm.ppf(0.975) * 0.2)
    assert scores.score(0.5, None, 100).low is None


@pytest.mark.parametrize(
    ("value", "stderr", "percent", "text"),
    [
        (0.71234, 0.0143, True, "71.2 % (68.4 to 74.0)"),
        (12.3456, 0.21, False, "12.35 (11.93 to 12.76)"),
        (-0.0421, 0.031, False, "\N{MINUS SIGN}0.042 (\N{MINUS SIGN}0.103 to 0.019)"),
        (0.0, 0.0, True, "0.0 % (0.0 to 0.0)"),
        (1234.5, None, False, "1234"),
        (0.0123456, None, False, "0.01235"),
        (float("nan"), None, True, "not a number"),
    ],
)
def test_digits(value: float, stderr: float | None, percent: bool, text: str) -> None:
    assert plain(scores.score_text(scores.score(value, stderr, None), percent)) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.44, "8.4 s"), (59.99, "60.0 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_gap_has_an_interval_where_the_log_has_standard_errors() -> None:
    line = {"step": 5, "validation_loss": 2.0, "probe_loss": 1.5}
    known = {**line, "validation_loss_stderr": 0.03, "probe_loss_stderr": 0.04}  # 1.96 x 0.05 = 0.098
    assert "+0.500 against a fixed training probe (the generalisation gap)" in loss_sentences(evaluations([line]))[0]
    interval = "(the generalisation gap; 95 % interval over rows +0.402 to +0.598)"
    assert interval in loss_sentences(evaluations([known]))[0]
    assert "stands without an interval" in " ".join(training_loss_sentences([line], evaluations([line])))
    assert "stands without an interval" not in " ".join(training_loss_sentences([known], evaluations([known])))
