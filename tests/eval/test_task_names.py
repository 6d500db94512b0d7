"""Which tasks a recipe's names stand for, and what a wrong name or file answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.group import Group
from task_data import write_data

from eval.prompt import TrainingPrompt
from eval.tasks import OUR_TASKS, check_tasks, leaf_tasks, load_tasks
from pipeline.errors import UserError
from pipeline.recipe.schema import Base, Data, Eval, Recipe, Source


def recipe(section: Eval, **source: object) -> Recipe:
    return Recipe(
        name="r", base=Base(model="./b"), data=Data(train=[Source(path="unused.json", **source)]), eval=section
    )


def folder_with(tmp_path: Path, task_folder: Path, name: str, text: str) -> Path:
    """A copy of the tiny tasks with one more file."""
    for file in task_folder.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / name).write_text(text)
    return tmp_path


def test_names_files_and_order(task_folder: Path) -> None:
    by_path = str(task_folder / "tiny_words.yaml")
    section = Eval(tasks=["tiny_text", by_path, "tiny_choice"], task_folders=[str(task_folder)])
    assert [task.task_name for task in load_tasks(section)] == ["tiny_text", "tiny_words", "tiny_choice"]


GROUP = """\
group: tiny_group
task:
  - tiny_choice
  - task: inline
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {data}}}}}
    test_split: test
    output_type: generate_until
    doc_to_text: "{{{{question}}}}"
    doc_to_target: "x"
    generation_kwargs: {{until: ["."]}}
    metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""


def test_groups_and_their_members(tmp_path: Path, task_folder: Path) -> None:
    folder = folder_with(tmp_path, task_folder, "group.yaml", GROUP.format(data=task_folder / "documents.jsonl"))
    (group,) = load_tasks(Eval(tasks=["tiny_group"], task_folders=[str(folder)]))
    assert isinstance(group, Group)
    assert [task.task_name for task in leaf_tasks([group])] == ["tiny_choice", "tiny_group::inline"]
    (member,) = load_tasks(Eval(tasks=["tiny_group::inline"], task_folders=[str(folder)]))
    assert member.task_name == "tiny_group::inline"
    with pytest.raises(UserError, match=r"group 'tiny_group' has no task 'tiny_group::inlin'; did you mean .*inline"):
        load_tasks(Eval(tasks=["tiny_group::inlin"], task_folders=[str(folder)]))
    with pytest.raises(UserError, match="tiny_choice is asked for twice"):
        load_tasks(Eval(tasks=["tiny_group", "tiny_choice"], task_folders=[str(folder)]))


@pytest.mark.slow
def test_an_unknown_name_gets_the_nearest_known_ones(task_folder: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tasks(Eval(tasks=["tiny_choise", "arc_eazy"], task_folders=[str(task_folder)]))
    assert "'tiny_choise'" in str(error.value) and "did you mean tiny_choice" in str(error.value)
    assert "'arc_eazy'" in str(error.value) and "arc_easy" in str(error.value), "lm-eval's own names are searched too"


def test_an_mmlu_subject_is_a_task_of_its_own(tmp_path: Path) -> None:
    write_data(tmp_path, [path.stem for path in (OUR_TASKS / "mmlu").glob("[!_]*.yaml")])
    with pytest.raises(UserError, match="no task 'local_mmlu::anatomy'; did you mean local_mmlu_anatomy"):
        load_tasks(Eval(tasks=["local_mmlu::anatomy"], data_folder=str(tmp_path)))
    with pytest.raises(UserError, match="local_mmlu_virology is asked for twice"):
        load_tasks(Eval(tasks=["local_mmlu_other", "local_mmlu_virology"], data_folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Eval(tasks=[]), "eval.tasks: empty"),
        (Eval(tasks=["./nowhere.yaml"]), "found './nowhere.yaml', which is no file"),
        (Eval(tasks=["x"], task_folders=["./nowhere"]), "eval.task_folders: found 'nowhere', which is no folder"),
    ],
)
def test_wrong_places(section: Eval, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_tasks(section)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("broken.yaml", "task: broken\n  indented: wrong", "mapping values"),
        (
            "no_data.yaml",
            "task: no_data\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.json}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: q\ndoc_to_target: a",
            "nowhere.json",
        ),
        (
            "hub.yaml",
            "task: hub\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: generate_until\n"
            "doc_to_text: q\ndoc_to_target: a",
            "nobody/nothing",
        ),
        ("key.yaml", "task: key\ndataset_pth: json\noutput_type: generate_until", "dataset_pth"),
    ],
)
def test_a_task_file_that_cannot_be_loaded_says_why(tmp_path: Path, name: str, text: str, cause: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tasks(Eval(tasks=[str(tmp_path / name)]))
    assert f"{name}' cannot be loaded" in str(error.value)
    assert cause in str(error.value)


def test_a_network_that_is_lost_while_data_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(
        "import httpx2\n\n\ndef rows(**_):\n    raise httpx2.ReadError('reset by peer')\n"
    )
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ncustom_dataset: !function lost.rows\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: q\ndoc_to_target: a\n"
    )
    with pytest.raises(UserError, match=r"ReadError: reset by peer\n.* nor to be had from the Hub"):
        load_tasks(Eval(tasks=[str(tmp_path / "lost.yaml")]))


def test_tasks_that_run_generated_code_are_refused(tmp_path: Path, task_folder: Path) -> None:
    text = (task_folder / "tiny_words.yaml").read_text().replace("task: tiny_words", "task: coder\nunsafe_code: true")
    (tmp_path / "coder.yaml").write_text(text)
    with pytest.raises(UserError, match="coder would run code that the model writes"):
        load_tasks(Eval(tasks=["coder"], task_folders=[str(tmp_path)]))


def test_checking_before_training(task_folder: Path) -> None:
    check_tasks(recipe(Eval(tasks=[])))
    section = Eval(tasks=["tiny_choice"], task_folders=[str(task_folder)], prompt="training")
    check_tasks(recipe(section))
    with pytest.raises(UserError, match=r"data.train.0.prompt: .*'persona' is undefined"):
        check_tasks(recipe(section, prompt="{{ persona }}: {{ instruction }}"))


def test_the_training_prompt_fills_the_sources_own_columns() -> None:
    section = Eval(tasks=["t"])
    alpaca = TrainingPrompt(recipe(section)).render("Add 2 and 3.")
    assert "### Instruction:\nAdd 2 and 3.\n\n### Response:\n" in alpaca and "### Input" not in alpaca
    assert TrainingPrompt(recipe(section, format="prompt-completion")).render("Add.\n") == "Add.\n"
    own = {"columns": {"instruction": "question"}, "prompt": "Q: {{ question }}\nA:"}
    assert TrainingPrompt(recipe(section, **own)).render("Add.") == "Q: Add.\nA:"
