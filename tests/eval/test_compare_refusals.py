"""What is not compared: runs that were asked other things, claims without seeds, power from the tested data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_runs import answered, choice_samples, text_samples, write_run

from eval.compare.run import Declared, compare_adapters, compare_masks, compare_methods
from eval.compare.runs import read_runs
from pipeline.errors import UserError


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return " ".join(str(error.value).split())


def compare(*runs: Path | str, **declared: Any) -> None:
    compare_adapters([str(run) for run in runs], Declared(**declared), Path(str(runs[0]).partition(":")[0]) / "never")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a", {"easy": choice_samples(20, 1), "hard": choice_samples(10, 2)}, "a")


def other(folder: Path, change: Callable[[dict[str, Any]], None] | None = None, **tasks: Any) -> Path:
    given = {"easy": choice_samples(20, 5), "hard": choice_samples(10, 6), **tasks}
    return write_run(folder / "b", {name: found for name, found in given.items() if found}, "b", change=change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["versions"].update(easy=2.0), "easy, version: 1.0 in a:deterministic, 2.0 in b:deterministic"),
        (lambda r: r["n-shot"].update(hard=5), "hard, few-shot examples: 0 in a:deterministic, 5 in b:deterministic"),
        (lambda r: r["lora_dropout"].update(limit=20), "eval.limit: none in a:deterministic, 20 in b:deterministic"),
        (lambda r: r["lora_dropout"].update(prompt="training"), "eval.prompt: task in a:deterministic, training in b"),
    ],
)
def test_other_settings(first: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    said = refusal(lambda: compare(first, other(tmp_path, change)))
    assert message in said and "a:deterministic: " + str(first) in said and "eval.num_fewshot" in said
    assert not (first / "never").exists()


def test_other_documents_are_counted_and_named(first: Path, tmp_path: Path) -> None:
    changed = choice_samples(20, 5)
    for number in (3, 7, 11, 13):
        changed[number]["doc_hash"] = "another"
    said = refusal(lambda: compare(first, other(tmp_path, easy=changed)))
    assert (
        "easy, 20 documents in a:deterministic, 20 in b:deterministic: 4 of 20 documents have another content "
        "(the first are documents 3, 7, 11)" in said
    )
    assert "hard" not in said


def test_missing_documents_are_counted_and_named(first: Path, tmp_path: Path) -> None:
    said = refusal(lambda: compare(first, other(tmp_path, easy=choice_samples(18, 5))))
    assert "20 documents in a:deterministic, 18 in b:deterministic: 2 documents are in a:deterministic only" in said
    assert "the first are documents 18, 19" in said


def test_other_prompts_show_where_they_part(first: Path, tmp_path: Path) -> None:
    changed = choice_samples(20, 5)
    for one in changed[4:]:
        one["arguments"] = [[prompt.replace("Answer:", "Reply:"), choice] for prompt, choice in one["arguments"]]
        one["lora_dropout"]["request_hash"] = f"other {one['doc_id']}"
    said = refusal(lambda: compare(first, other(tmp_path, easy=changed)))
    assert "16 of 20 documents were asked in other words" in said and "documents 4, 5, 6" in said
    assert "Answer:" in said and "Reply:" in said and "from character" in said


def test_other_choices_after_the_first_are_found(first: Path, tmp_path: Path) -> None:
    """lm-eval's own prompt hash covers the first choice only."""
    changed = choice_samples(20, 5)
    changed[9]["arguments"][2][1] = " none of them"
    changed[9]["lora_dropout"]["request_hash"] = "other"
    said = refusal(lambda: compare(first, other(tmp_path, easy=changed)))
    assert "1 of 20 documents were asked in other words" in said and "(document 9)" in said
    assert "with equal prompts: the choices or the generation settings differ" in said


def test_another_right_answer_is_found(first: Path, tmp_path: Path) -> None:
    changed = choice_samples(20, 5)
    changed[2]["target"] = "another"
    said = refusal(lambda: compare(first, other(tmp_path, easy=changed)))
    assert "1 of 20 documents have another right answer (document 2)" in said and "'another'" in said


def test_all_problems_come_at_once(first: Path, tmp_path: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        results["versions"]["easy"] = 3.0
        results["lora_dropout"]["limit"] = 18

    said = refusal(lambda: compare(first, other(tmp_path, change, easy=choice_samples(18, 5))))
    assert "version" in said and "eval.limit" in said and "2 documents are in a:deterministic only" in said


def test_other_tasks(first: Path, tmp_path: Path) -> None:
    second = other(tmp_path, hard=None, texts=text_samples(5, 1))
    said = refusal(lambda: compare(first, second))
    assert "These runs have different tasks." in said
    assert "only in a:deterministic: hard" in said and "only in b:deterministic: texts" in said
    assert "What all have is compared by --task easy" in said
    compare_adapters([str(first), str(second)], Declared(tasks=["easy"]), tmp_path / "easy")
    assert "--task hard: not in b:deterministic" in refusal(lambda: compare(first, second, tasks=["hard"]))
    alone = write_run(tmp_path / "c", {"texts": text_samples(5, 1)}, "c")
    said = refusal(lambda: compare(first, alone))
    assert (
        "they have no task in common" in said and "a:deterministic: easy" in said and "c:deterministic: texts" in said
    )


def test_runs_that_cannot_be_read(first: Path, tmp_path: Path) -> None:
    assert "no results.json here" in refusal(lambda: compare(first, tmp_path / "nowhere"))
    assert "a comparison needs two" in refusal(lambda: compare(first))
    said = refusal(lambda: compare(f"{first}:ensemble", first))
    assert "the system ensemble was not evaluated there; it has deterministic" in said
    assert "did you mean deterministic?" in refusal(lambda: compare(f"{first}:determinstic", first))
    old = write_run(tmp_path / "old", {"easy": answered([True, False])}, "old", change=without_analysis)
    assert "an older version of this project wrote it; evaluate again" in refusal(lambda: compare(first, old))
    damaged = other(tmp_path)
    lines = (damaged / "samples_deterministic_easy.jsonl").read_text().splitlines()
    (damaged / "samples_deterministic_easy.jsonl").write_text("\n".join([*lines[:4], lines[4][:50]]) + "\n")
    assert "samples_deterministic_easy.jsonl: line 5 is not JSON" in refusal(lambda: compare(first, damaged))


def without_analysis(results: dict[str, Any]) -> None:
    del results["lora_dropout"]["systems"]["deterministic"]["analysis"]


def test_the_last_system_is_taken_and_latest_is_followed(tmp_path: Path) -> None:
    tasks = {"easy": choice_samples(8, 1)}
    run = write_run(tmp_path / "a" / "20300101", {}, "a", systems={"base": tasks, "deterministic": tasks})
    (tmp_path / "a" / "latest").symlink_to(run.name)
    found = read_runs([str(tmp_path / "a"), f"{tmp_path}/a/latest:base", str(run)])
    assert [one.folder for one in found] == [run.resolve()] * 3
    assert [(one.system, one.named) for one in found] == [
        ("deterministic", False),
        ("base", True),
        ("deterministic", False),
    ]
    assert len({one.label for one in found}) == 3 and found[1].label == "a:base"


def test_overrides_are_checked(first: Path, tmp_path: Path) -> None:
    second = other(tmp_path)
    assert "did you mean easy?" in refusal(lambda: compare(first, second, primary=["eazy=nll"]))
    said = refusal(lambda: compare(first, second, primary=["easy=f1"]))
    assert "a:deterministic has no 'f1' on easy; it has acc, nll" in said
    said = refusal(lambda: compare(first, second, primary=["easy=nll", "easy=brier"]))
    assert "one metric per task is tested" in said


def test_a_pilot_is_never_the_tested_data(first: Path, tmp_path: Path) -> None:
    second = other(tmp_path)
    said = refusal(lambda: compare(first, second, pilot=(str(first), str(second))))
    assert "post-hoc power" in said and "--discordance 0.1" in said


def test_claims_about_methods_need_five_paired_seeds(tmp_path: Path) -> None:
    for seed in range(4):
        for name in ("lora", "drop"):
            write_run(tmp_path / f"{name}-{seed}", {"easy": answered([True, seed % 2 == 0])}, name, seed)
    methods = [f"lora={tmp_path}/lora-*", f"drop={tmp_path}/drop-*"]
    said = refusal(lambda: compare_methods(methods, Declared(), tmp_path / "never"))
    assert "at least 5 training seeds of each; found 4" in said and "launch/compare.py RUN RUN" in said
    write_run(tmp_path / "lora-4", {"easy": answered([True, False])}, "lora", 4)
    write_run(tmp_path / "drop-4", {"easy": answered([True, False])}, "drop", 7)
    said = refusal(lambda: compare_methods(methods, Declared(), tmp_path / "never"))
    assert "lora: 0, 1, 2, 3, 4" in said and "drop: 0, 1, 2, 3, 7" in said
    twice = [*methods, f"lora={tmp_path}/lora-2"]
    assert "training seed 2 occurs 2 times" in refusal(lambda: compare_methods(twice, Declared(), tmp_path / "never"))
    said = refusal(lambda: compare_methods([f"lora={tmp_path}/nothing-*"], Declared(), tmp_path / "never"))
    assert "no folder fits" in said
    assert "expected NAME=RUN" in refusal(lambda: compare_methods(["lora"], Declared(), tmp_path / "never"))
    said = refusal(lambda: compare_methods(methods[:1], Declared(), tmp_path / "never"))
    assert "found lora only" in said
    said = refusal(lambda: compare_methods(methods, Declared(discordance=0.1), tmp_path / "never"))
    assert "with --method seeds are tested" in said


def test_equal_differences_are_no_sample(tmp_path: Path) -> None:
    """Seeds that change nothing: no test, and the reason instead of a p-value."""
    for seed in range(5):
        write_run(tmp_path / f"lora-{seed}", {"easy": answered([True, False])}, "lora", seed)
        write_run(tmp_path / f"drop-{seed}", {"easy": answered([True, True])}, "drop", seed)
    methods = [f"lora={tmp_path}/lora-*", f"drop={tmp_path}/drop-*"]
    out = compare_methods(methods, Declared(tasks=["easy"]), tmp_path / "out")
    text = (out / "comparison.md").read_text()
    assert "Student's t needs differences that vary" in text and "could not be tested" in text


def test_mask_seeds_must_be_all_that_differs(tmp_path: Path) -> None:
    tasks = {"easy": answered([True, False, True])}
    runs = [str(write_run(tmp_path / f"m{seed}", tasks, "m", mask_seed=seed)) for seed in range(3)]

    def masks(*given: str) -> str:
        return refusal(lambda: compare_masks(list(given), Declared(), tmp_path / "never"))

    assert "found 2 runs, and a spread needs at least 3" in masks(*runs[:2])
    assert "mask seed 1 occurs 2 times" in masks(*runs[:2], runs[1])
    retrained = str(write_run(tmp_path / "seed", tasks, "m", seed=2, mask_seed=7))
    assert "differ in more than the masks: seed" in masks(*runs[:2], retrained)
    plain = str(write_run(tmp_path / "plain", tasks, "m"))
    assert "has no masks" in masks(*runs[:2], plain)

    def elsewhere(results: dict[str, Any]) -> None:
        results["lora_dropout"]["adapter"] = "outputs/other"

    moved = str(write_run(tmp_path / "moved", tasks, "m", mask_seed=8, change=elsewhere))
    assert "differ in more than the masks: the adapter" in masks(*runs[:2], moved)


def test_an_output_that_cannot_be_written_is_refused_first(first: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(lambda: compare_adapters([str(first)] * 2, Declared(), tmp_path / "file" / "out"))
    assert "--output" in said and "cannot be written" in said
