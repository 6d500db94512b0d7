"""The task files: they build, their documents are right, and their prompts are lm-eval's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from eval.local_data import arc_document, load, load_mmlu
from pipeline.errors import UserError

Builder = Callable[[str], dict[str, Task]]


@pytest.fixture(scope="module")
def data_folder(shared: Path) -> Path:
    return shared / "data" / "eval"


@pytest.fixture(scope="module")
def build(repository: Path, data_folder: Path) -> Builder:
    manager = TaskManager(
        include_path=str(repository / "eval" / "tasks"),
        include_defaults=False,
        metadata={"data_folder": str(data_folder)},
    )
    return lambda name: manager.load([name])["tasks"]


@pytest.fixture(scope="module")
def build_pocket(repository: Path) -> Builder:
    manager = TaskManager(include_path=str(repository / "recipes" / "pocket" / "tasks"), include_defaults=False)
    return lambda name: manager.load([name])["tasks"]


def check_choices(task: Task) -> None:
    """Every document has at least two choices and a gold answer among them."""
    for document in task.eval_docs:
        choices, gold = task.doc_to_choice(document), task.doc_to_target(document)
        assert len(choices) >= 2, document
        assert 0 <= gold < len(choices), document


def stock(path: str) -> dict[str, Any]:
    """A stock task file of lm-eval."""
    return yaml.safe_load((Path(lm_eval.tasks.__file__).parent / path).read_text())


def ours(repository: Path, name: str) -> dict[str, Any]:
    text = (repository / "eval" / "tasks" / name).read_text()
    return yaml.safe_load(text.replace("!function ", ""))


@pytest.mark.parametrize(
    ("name", "reference", "same"),
    [
        ("arc_easy.yaml", "arc/arc_easy.yaml", ["output_type", "doc_to_text"]),
        ("sst2.yaml", "glue/sst2/default.yaml", ["output_type", "doc_to_choice", "doc_to_target"]),
        (
            "gsm8k.yaml",
            "gsm8k/gsm8k.yaml",
            ["doc_to_text", "doc_to_target", "generation_kwargs", "filter_list", "metric_list", "num_fewshot"],
        ),
        (
            "mmlu.yaml",
            "mmlu/default/_default_template_yaml",
            ["output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "fewshot_config", "metric_list"],
        ),
    ],
)
def test_prompts_and_metrics_are_those_of_lm_eval(repository: Path, name: str, reference: str, same: list[str]) -> None:
    own, original = ours(repository, name), stock(reference)
    assert {key: own[key] for key in same} == {key: original[key] for key in same}
    assert [metric["metric"] for metric in own["metric_list"]] == [m["metric"] for m in original["metric_list"]]


def test_sst2_asks_as_lm_eval_does(repository: Path) -> None:
    """Its text column is called content in GLUE's files and sentence on the Hub."""
    assert (
        ours(repository, "sst2.yaml")["doc_to_text"].replace("content", "sentence")
        == (stock("glue/sst2/default.yaml")["doc_to_text"])
    )


def test_mmlu_lists_the_subjects_of_lm_eval_with_their_headings(repository: Path) -> None:
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    headings = {
        config["dataset_name"]: config["description"]
        for config in (yaml.safe_load(file.read_text()) for file in folder.glob("mmlu_*.yaml"))
        if "dataset_name" in config
    }
    own = ours(repository, "mmlu.yaml")
    subjects = [item["dataset_kwargs"]["subject"] for item in own["task"]]
    assert subjects == [item["task"] for item in own["task"]] == sorted(headings)
    for subject in subjects:
        assert own["description"].replace("{{subject}}", subject.replace("_", " ")) == headings[subject]


def test_arc_easy(build: Builder, data_folder: Path) -> None:
    (task,) = build("local_arc_easy").values()
    check_choices(task)
    raw = json.loads((data_folder / "arc_easy" / "test.json").read_text())
    assert len(task.eval_docs) == len(raw) > 2000
    first = task.eval_docs[0]
    prompt = task.fewshot_context(first, num_fewshot=0)
    assert prompt.startswith("Question: Which statement best explains why photosynthesis") and prompt.endswith(
        "\nAnswer:"
    )
    assert (
        task.doc_to_choice(first)[task.doc_to_target(first)]
        == "Sunlight is the source of energy for nearly all ecosystems."
    )
    # nothing of the instructions is lost or doubled
    for document, row in zip(task.eval_docs, raw, strict=True):
        assert document["question"] in row["instruction"]
        assert "Answer1" not in document["question"] and "Answer format" not in str(document["choices"])
        assert row["instruction"].count("Answer") >= len(document["choices"])
        assert all(choice and choice in row["instruction"] for choice in document["choices"])


def test_arc_choices_that_hold_spaces_and_colons() -> None:
    row = {
        "instruction": "Please choose the correct answer to the question: Two\n\nparagraphs: why?\n\n"
        "Answer1: ratio 1:2 of a Answer2: none, really\n\nAnswer format: answer1/answer2",
        "answer": "answer2",
    }
    assert arc_document(row) == {
        "question": "Two\n\nparagraphs: why?",
        "choices": ["ratio 1:2 of a", "none, really"],
        "gold": 1,
    }


def test_sst2(build: Builder, data_folder: Path) -> None:
    (task,) = build("local_sst2").values()
    check_choices(task)
    lines = (data_folder / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert [f"{document['label']}\t{document['content']}" for document in task.eval_docs] == lines


def test_gsm8k(build: Builder) -> None:
    (task,) = build("local_gsm8k").values()
    assert len(task.eval_docs) == 1319
    assert len(list(task.fewshot_docs())) == 7473
    assert task.doc_to_target(task.eval_docs[0]).endswith("#### 18")


@pytest.fixture(scope="module")
def mmlu(build: Builder) -> dict[str, Task]:
    return build("local_mmlu")


def test_mmlu_documents_are_the_files_cells(mmlu: dict[str, Task], data_folder: Path) -> None:
    """Every cell is text as it stands in the file: numbers, "None" and "NA" too."""
    assert len(mmlu) == 57
    assert sum(len(task.eval_docs) for task in mmlu.values()) == 14042
    for name, task in mmlu.items():
        subject = name.removeprefix("local_mmlu::")
        for split in ("dev", "test"):
            with (data_folder / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
                cells = list(csv.reader(file))
            documents = task.dataset[split]
            assert [[d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in documents] == cells, (subject, split)


def test_mmlu_prompt(mmlu: dict[str, Task]) -> None:
    task = mmlu["local_mmlu::us_foreign_policy"]
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    assert prompt.startswith("The following are multiple choice questions (with answers) about us foreign policy.\n\n")
    assert prompt.count("\nAnswer:") == 6 and prompt.endswith("\nAnswer:")


def test_no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_DROPOUT_DATA", raising=False)
    with pytest.raises(UserError, match=r"sst2/dev\.tsv.*eval\.data_folder.*LORA_DROPOUT_DATA"):
        load({"validation": "sst2/dev.tsv"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "dev").mkdir(parents=True)
    with pytest.raises(UserError, match=r"anatomy_dev\.csv.*anatomy_test\.csv.*eval/tasks/README\.md"):
        load_mmlu("anatomy", data_folder=str(tmp_path))


def test_the_recipes_folder_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DROPOUT_DATA", str(tmp_path / "elsewhere"))
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1?"}\n')
    assert load({"test": "a.jsonl"}, data_folder=str(tmp_path))["test"][0] == {"question": "1 + 1?"}


@pytest.mark.parametrize("name", ["pocket_choice", "pocket_shift"])
def test_pocket_choices(build_pocket: Builder, name: str) -> None:
    (task,) = build_pocket(name).values()
    check_choices(task)
    assert len(task.eval_docs) == 240
    document = task.eval_docs[0]
    assert task.fewshot_context(document, num_fewshot=0) == document["instruction"]
    # a choice is a whole completion: nothing comes between the prompt and its leading space
    assert task.config.target_delimiter == ""
    assert all(choice.startswith(" ") for choice in task.doc_to_choice(document))
    assert task.doc_to_choice(document)[task.doc_to_target(document)] == document["output"]


def test_pocket_answers(build_pocket: Builder) -> None:
    (task,) = build_pocket("pocket_answer").values()
    assert len(task.eval_docs) == 150
    assert all(document["choices"] == [] for document in task.eval_docs)
    assert all(task.doc_to_target(document) == document["output"][1:] for document in task.eval_docs)
