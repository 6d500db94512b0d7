"""The task files: their prompts, choices, targets and metrics are lm-eval's own, and their documents are the files'."""

from __future__ import annotations

import csv
import json
import random
import socket
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from task_data import ROWS, Splits, write_data

from eval.local_task import STOCK_TASKS
from eval.tasks import OUR_TASKS, leaf_tasks, load_tasks, task_manager
from pipeline.recipe.schema import Eval

SUBJECTS = sorted(path.stem for path in (OUR_TASKS / "mmlu").glob("[!_]*.yaml"))
STOCK_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "sst2": "glue/sst2",
    "rte": "glue/rte",
    "cola": "glue/cola",
    "mrpc": "glue/mrpc",
    "gsm8k": "gsm8k",
    "lambada_openai": "lambada",
    "wikitext": "wikitext",
    "mmlu_anatomy": "mmlu/default",
    "mmlu_high_school_us_history": "mmlu/default",
}
SINGLE = [name for name in STOCK_FOLDERS if not name.startswith("mmlu")]
OURS = {"task", "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"}
SPLITS = {"training_split", "validation_split", "test_split"}

Miniature = tuple[Path, dict[str, Splits]]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    folder = tmp_path_factory.mktemp("data")
    return folder, write_data(folder, SUBJECTS)


def local(folder: Path, *names: str) -> list[Task]:
    """Our tasks, of groups too."""
    return leaf_tasks(load_tasks(Eval(tasks=[f"local_{name}" for name in names], data_folder=str(folder))))


def stock(name: str, splits: Splits) -> Task:
    """lm-eval's own task on these documents, by its own means: a group that overrides where the data comes from."""
    manager = TaskManager(include_path=str(STOCK_TASKS / STOCK_FOLDERS[name]), include_defaults=False)
    documents = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
    documents.setdefault("train", next(iter(documents.values())))  # WikiText's, which nothing reads
    spec = {"group": "overridden", "task": [{"task": name, "custom_dataset": lambda **_: documents}]}
    return manager.load([spec])["tasks"][name]


def requests(task: Task, document: dict[str, Any], examples: int) -> list[Any]:
    """Arguments of all requests of a document after some examples."""
    task.set_fewshot_seed(5)
    context = task.fewshot_context(document, num_fewshot=examples)
    built = task.construct_requests(
        document, context, apply_chat_template=False, chat_template=None, metadata=("", 0, 1)
    )
    return [instance.args for instance in (built if isinstance(built, list) else [built])]


@pytest.mark.parametrize("name", STOCK_FOLDERS)
def test_a_task_is_lm_evals_own(name: str, miniature: Miniature) -> None:
    folder, documents = miniature
    (ours,) = local(folder, name)
    theirs = stock(name, documents[name])
    assert ours.task_name == f"local_{name}" and theirs.task_name == name
    for field in {each.name for each in fields(TaskConfig)} - OURS - SPLITS - {"fewshot_config"}:
        assert ours.config[field] == theirs.config[field], field
    assert ours.config.fewshot_config == theirs.config.fewshot_config
    assert ours.VERSION == theirs.VERSION and ours.OUTPUT_TYPE == theirs.OUTPUT_TYPE
    assert ours.aggregation() == theirs.aggregation() and ours.higher_is_better() == theirs.higher_is_better()
    shots = 0 if ours.OUTPUT_TYPE.startswith("loglikelihood") else 2
    assert len(ours.eval_docs) == len(theirs.eval_docs) == len(documents[name][list(documents[name])[-1]])
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        assert ours.doc_to_text(mine) == theirs.doc_to_text(other)
        assert ours.doc_to_target(mine) == theirs.doc_to_target(other)
        for examples in {0, shots}:
            assert requests(ours, mine, examples) == requests(theirs, other, examples)
        results = answers(ours, mine)
        assert ours.process_results(mine, results) == theirs.process_results(other, results)


def answers(task: Task, document: dict[str, Any]) -> list[Any]:
    """What a model might answer to a document's requests."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return [(-random.random(), False) for _ in task.doc_to_choice(document)]
    return {"generate_until": ["#### 7"], "loglikelihood": [(-3.0, True)], "loglikelihood_rolling": [-3.0]}[
        task.OUTPUT_TYPE
    ]


def test_a_task_says_where_it_comes_from(miniature: Miniature) -> None:
    (task,) = local(miniature[0], "rte")
    metadata = task.config.metadata
    assert metadata["stock"] == "glue/rte/default.yaml" and metadata["config_source"].endswith("eval/tasks/rte.yaml")
    assert metadata["source"].startswith("GLUE") and metadata["data_folder"] == str(miniature[0])
    assert task.config.dataset_path is None and task.dump_config()["dataset_kwargs"] == {
        "files": {"train": "rte/train.tsv", "validation": "rte/dev.tsv"}
    }


def test_mmlu_has_the_subjects_and_the_groups_of_lm_eval(miniature: Miniature) -> None:
    theirs = TaskManager(include_path=str(STOCK_TASKS / "mmlu" / "default"), include_defaults=False).task_index
    assert [f"mmlu_{subject}" for subject in SUBJECTS] == sorted(
        name for name in theirs if _is_subject(theirs[name].cfg)
    )
    (mmlu,) = load_tasks(Eval(tasks=["local_mmlu"], data_folder=str(miniature[0])))
    assert isinstance(mmlu, Group) and len(leaf_tasks([mmlu])) == 57
    assert [group.name.removeprefix("local_") for group in mmlu.get_all_groups()] == theirs["mmlu"].cfg["task"]
    for group in mmlu.get_all_groups():
        original = theirs[group.name.removeprefix("local_")].cfg
        tag = f"{group.name.removeprefix('local_')}_tasks"
        assert original["task"] == [tag] and group.alias == original["group_alias"]
        assert {name.removeprefix("local_") for name in group.child_names} == theirs[tag].tags
        assert [each.metric for each in group.aggregate_metric_list] == ["acc"]


def _is_subject(config: dict[str, Any] | None) -> bool:
    return "dataset_name" in (config or {})


@pytest.mark.parametrize(
    ("name", "clusters"),
    [("mmlu_high_school_us_history", ROWS // 2), ("rte", ROWS), ("mrpc", ROWS), ("mmlu_anatomy", None), ("sst2", None)],
)
def test_documents_that_share_a_text_say_so(name: str, clusters: int | None, miniature: Miniature) -> None:
    (task,) = local(miniature[0], name)
    field = task.config.metadata.get("cluster")
    assert (field is None) == (clusters is None)
    if field is not None:
        assert len({document[field] for document in task.eval_docs}) == clusters


def test_evaluation_asks_no_network(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task from its file to its metrics, with a model that answers at random."""

    def refuse(*address: object, **_: object) -> None:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = local(miniature[0], *SINGLE, "mmlu_stem")
    results = lm_eval.simple_evaluate(
        "dummy", tasks=loaded, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, limit=7
    )
    assert results is not None and len(results["results"]) == len(loaded)
    metrics = {name: {key.split(",")[0] for key in values} for name, values in results["results"].items()}
    assert metrics["local_cola"] >= {"mcc"} and metrics["local_mrpc"] >= {"acc", "f1"}
    assert metrics["local_wikitext"] >= {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert metrics["local_lambada_openai"] >= {"perplexity", "acc"} and metrics["local_gsm8k"] >= {"exact_match"}


def test_only_our_own_index_is_read() -> None:
    """lm-eval's would take 12 seconds."""
    manager = task_manager(Eval(tasks=["local_mmlu", "local_arc_easy"]))
    assert len(manager.all_subtasks) == 57 + len(SINGLE)
    assert all(name.startswith("local_") for name in manager.all_tasks)


@pytest.fixture(scope="module")
def data_folder(shared: Path) -> Path:
    return shared / "data" / "eval"


@pytest.fixture(scope="module")
def real(data_folder: Path) -> Callable[[str], Task]:
    """Our task on the real files, read once."""
    return cache(lambda name: local(data_folder, name)[0])


@pytest.mark.parametrize(
    ("name", "scored", "examples"),
    [
        ("arc_easy", 2376, 2251),
        ("arc_challenge", 1172, 1119),
        ("openbookqa", 500, 4957),
        ("sst2", 872, 67349),
        ("rte", 277, 2490),
        ("cola", 527 + 516, 8551),
        ("mrpc", 1725, 4076),
        ("gsm8k", 1319, 7473),
        ("lambada_openai", 8, 8),
        ("wikitext", 62, 60),
    ],
)
def test_real_files_have_the_published_counts(
    name: str, scored: int, examples: int, real: Callable[[str], Task]
) -> None:
    task = real(name)
    assert len(task.eval_docs) == scored
    assert len(task.sampler.df or []) == examples
    if task.OUTPUT_TYPE == "multiple_choice":
        for document in task.eval_docs.select(range(0, scored, 9)):  # rendering takes a millisecond
            choices, right = task.doc_to_choice(document), task.doc_to_target(document)
            assert len(choices) >= 2 and all(choices) and 0 <= int(right) < len(choices), document


def test_real_arc_loses_and_doubles_nothing(data_folder: Path, real: Callable[[str], Task]) -> None:
    task = real("arc_easy")
    raw = json.loads((data_folder / "arc_easy" / "test.json").read_text())
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=0).startswith("Question: Which statement best explains")
    for document, row in zip(task.eval_docs, raw, strict=True):
        question, choices = document["question"], document["choices"]["text"]
        assert question in row["instruction"] and "Answer1" not in question and "Answer format" not in str(choices)
        assert all(choice in row["instruction"] for choice in choices)
        listed = f"{question} {' '.join(f'Answer{n}: {choice}' for n, choice in enumerate(choices, start=1))}"
        assert " ".join(listed.split()) in " ".join(row["instruction"].split())
        assert row["answer"] == f"answer{document['choices']['label'].index(document['answerKey']) + 1}"


def test_real_glue_files_are_read_cell_by_cell(data_folder: Path, real: Callable[[str], Task]) -> None:
    """Single quotes stay where they are, and no row swallows the next."""
    sst2, mrpc = real("sst2"), real("mrpc")
    lines = (data_folder / "sst2" / "dev.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    assert [f"{document['label']}\t{document['sentence']}" for document in sst2.eval_docs] == lines
    text = (data_folder / "mrpc" / "msr_paraphrase_test.txt").read_text(encoding="utf-8-sig")
    cells = [line.split("\t") for line in text.split("\n")[1:] if line]
    assert [[str(d["label"]), d["sentence1"], d["sentence2"]] for d in mrpc.eval_docs] == [
        [cell[0], cell[3], cell[4]] for cell in cells
    ]
    sizes = [len(set(column)) for column in zip(*(cell[:3] for cell in cells), strict=True)]
    assert len({document["cluster"] for document in mrpc.eval_docs}) == 1670 < min(sizes[1:])


def test_real_wikitext_articles_make_up_the_file(data_folder: Path, real: Callable[[str], Task]) -> None:
    pages = [document["page"] for document in real("wikitext").eval_docs]
    assert " \n" + "\n".join(pages) == (data_folder / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    assert all(page.startswith(" = ") and not page.startswith(" = = ") for page in pages)


def test_real_mmlu_documents_are_the_files_cells(data_folder: Path) -> None:
    """Every cell is text as it stands in the file: numbers, "None" and "NA" too."""
    mmlu = local(data_folder, "mmlu")
    assert sum(len(task.eval_docs) for task in mmlu) == 14042
    for task in mmlu:
        subject = task.task_name.removeprefix("local_mmlu_")
        for split in ("dev", "test"):
            with (data_folder / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
                cells = list(csv.reader(file))
            documents = task.dataset[split]
            assert [[d["question"], *d["choices"], "ABCD"[d["answer"]]] for d in documents] == cells, (subject, split)
    history = next(task for task in mmlu if task.task_name == "local_mmlu_high_school_us_history")
    assert len({document[history.config.metadata["cluster"]] for document in history.eval_docs}) == 66
    prompt = history.fewshot_context(history.eval_docs[0], num_fewshot=5)
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
    )
    assert prompt.count("\nAnswer:") == 6 and prompt.endswith("\nAnswer:")


Builder = Callable[[str], dict[str, Task]]


@pytest.fixture(scope="module")
def build_pocket(repository: Path) -> Builder:
    manager = TaskManager(include_path=str(repository / "recipes" / "pocket" / "tasks"), include_defaults=False)
    return lambda name: manager.load([name])["tasks"]


@pytest.mark.parametrize("name", ["pocket_choice", "pocket_shift"])
def test_pocket_choices(build_pocket: Builder, name: str) -> None:
    (task,) = build_pocket(name).values()
    assert len(task.eval_docs) == 240
    for document in task.eval_docs:
        choices = task.doc_to_choice(document)
        assert len(choices) >= 2 and 0 <= task.doc_to_target(document) < len(choices), document
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
