"""What a missing folder, a missing file and a malformed row answer, and the formats that are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from task_data import write_data

from eval.local_data import Document, arc, cola, gsm8k, lambada, mmlu, mrpc, rte, sst2, unchanged, wikitext
from eval.local_task import stock_config
from eval.tasks import leaf_tasks, load_tasks
from pipeline.errors import UserError
from pipeline.recipe.schema import Eval


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path, ["anatomy"])
    return tmp_path


def refusal(folder: Path | str | None, task: str = "local_rte") -> str:
    """What loading a task answers."""
    with pytest.raises(UserError) as error:
        load_tasks(Eval(tasks=[task], data_folder=None if folder is None else str(folder)))
    return str(error.value)


def test_no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_DROPOUT_DATA", raising=False)
    message = refusal(None)
    assert message.startswith("local_rte: no data folder: set eval.data_folder")
    assert "LORA_DROPOUT_DATA" in message and "rte/dev.tsv" in message and "from GLUE" in message


def test_a_data_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "eval.data_folder is './nowhere', which is no folder" in refusal("./nowhere")
    monkeypatch.setenv("LORA_DROPOUT_DATA", str(tmp_path / "gone"))
    assert f"LORA_DROPOUT_DATA is '{tmp_path / 'gone'}', which is no folder" in refusal(None)


def test_the_recipes_folder_goes_before_the_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DROPOUT_DATA", str(folder / "elsewhere"))
    (task,) = leaf_tasks(load_tasks(Eval(tasks=["local_rte"], data_folder=str(folder))))
    assert len(task.eval_docs) == 8
    monkeypatch.setenv("LORA_DROPOUT_DATA", str(folder))
    assert len(leaf_tasks(load_tasks(Eval(tasks=["local_rte"])))) == 1


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "rte" / "dev.tsv").unlink()
    message = refusal(folder)
    assert f"local_rte: no file {folder / 'rte' / 'dev.tsv'}" in message
    assert "GLUE (gluebenchmark.com/tasks), RTE" in message and "eval/tasks/README.md" in message
    assert f"local_mmlu_virology: no file {folder}/mmlu/dev/virology_dev.csv" in refusal(folder, "local_mmlu_virology")


def test_of_two_files_for_one_pattern_none_is_taken(folder: Path) -> None:
    (folder / "lambada" / "more.jsonl").write_text("{}")
    message = refusal(folder, "local_lambada_openai")
    assert f"{folder / 'lambada'}/*.jsonl should be one file, found more.jsonl, some.jsonl" in message


def test_an_empty_file(folder: Path) -> None:
    for file, task in (("rte/dev.tsv", "local_rte"), ("arc_easy/test.json", "local_arc_easy")):
        (folder / file).write_text("")
        assert f"{task}: {folder / file} is empty" in refusal(folder, task)


def test_a_malformed_row_is_told_with_its_task_and_line(folder: Path) -> None:
    file = folder / "rte" / "dev.tsv"
    lines = file.read_text().split("\n")
    lines[4] = lines[4].replace("\tentailment", "\tnot sure").replace("\tnot_entailment", "\tnot sure")
    file.write_text("\n".join(lines))
    message = refusal(folder)
    assert f"local_rte: {file}, line 5: label is 'not sure', expected one of entailment, not_entailment" in message
    assert "The task reads rte/train.tsv, rte/dev.tsv of the data folder" in message


Reader = Callable[[Path], list[Document]]

HEADER = "index\tsentence1\tsentence2\tlabel\n"
ARC_ROW = {
    "instruction": "Please choose the correct answer to the question: Two\n\nparagraphs: why?\n\n"
    "Answer1: ratio 1:2 of a Answer2: none, really\n\nAnswer format: answer1/answer2",
    "answer": "answer2",
}


def changed(**cells: object) -> str:
    return json.dumps([ARC_ROW, {**ARC_ROW, **cells}])


@pytest.mark.parametrize(
    ("read", "name", "text", "message"),
    [
        (
            rte,
            "a.tsv",
            HEADER + "0\tone\ttwo\n",
            "line 2: found 3 cells, expected 4 cells (index, sentence1, sentence2",
        ),
        (rte, "a.tsv", HEADER + "0\tone\t \tentailment\n", "line 2: sentence2 is ' ', expected text"),
        (rte, "a.tsv", "premise\tlabel\none\tentailment\n", "line 2: no column 'sentence1'; it has 'premise', 'label'"),
        (sst2, "a.tsv", "label\tcontent\n2\tgood\n", "line 2: label is '2', expected one of 0, 1"),
        (sst2, "a.tsv", "label\tcontent\n01\tgood\n", "line 2: label is '01', expected one of 0, 1"),
        (sst2, "a.tsv", "label\ttext\n1\tgood\n", "line 2: no column 'sentence'; it has 'label', 'text'"),
        (
            cola,
            "a.tsv",
            "gj04\t1\tA sentence.\n",
            "line 1: found 3 cells, expected 4 cells (source, ",
        ),
        (mrpc, "a.txt", "Quality\t#1 ID\n1\t7\n", "line 2: no column '#2 ID'"),
        (
            mmlu,
            "anatomy_dev.csv",
            "Q,a,b,c,A\n",
            "line 1: found 5 cells, expected 6 cells (question, ",
        ),
        (mmlu, "anatomy_dev.csv", "Q,a,b,c,d,A\nQ,a,b,c,d,AB\n", "line 2: letter is 'AB', expected one of A, B, C, D"),
        (mmlu, "anatomy_dev.csv", 'Q,a,b,c,d,A\n"Q,a,b,c,d,A\n', "line 2: not csv: unexpected end of data"),
        (gsm8k, "a.jsonl", '{"question": "1 + 1?", "answer": "2"}\n', "line 1: the answer has no '####'"),
        (gsm8k, "a.jsonl", '\n{"question": 1, "answer": "#### 2"}\n', "line 2: question is 1, expected text"),
        (gsm8k, "a.jsonl", '{"question": "1 + 1?"\n', "line 1: not JSON: Expecting ',' delimiter"),
        (gsm8k, "a.jsonl", '["1 + 1?"]\n', "line 1: expected an object with named values, found \"['1 + 1?']\""),
        (lambada, "a.jsonl", '{"context": "He said", "continuation": "two words"}\n', "expected one word"),
        (lambada, "a.jsonl", '{"text": "word"}\n', "line 1: found 'word', expected a text of several words"),
        (arc, "a.json", '{"instruction": "Why?"}', "expected a list of objects, found dict"),
        (arc, "a.json", "[{]", "not JSON: Expecting property name enclosed in double quotes: line 1 column 3"),
        (arc, "a.json", changed(answer="answer3"), "row 2: answer is 'answer3', expected one of answer1, answer2"),
        (arc, "a.json", changed(answer=None), "row 2: answer is None, expected text"),
        (arc, "a.json", changed(instruction="Why?"), "row 2: the instruction is not 'Please choose"),
        (
            arc,
            "a.json",
            changed(instruction=f"{ARC_ROW['instruction']}/answer3"),
            "row 2: the instruction lists 2 answers and names answer1/answer2/answer3",
        ),
        (unchanged, "a.parquet", "PAR1", "expected one of .json, .jsonl, .csv, .tsv"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, read: Reader, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}") and message in str(error.value)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_bytes(b"label\tcontent\n1\tr\xe9sum\xe9\n")
    with pytest.raises(UserError, match=r"dev\.tsv: not UTF-8 text: .* at byte 17"):
        sst2(tmp_path / "dev.tsv")


def test_arc_choices_that_hold_spaces_and_colons(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ARC_ROW]))
    assert arc(tmp_path / "a.json") == [
        {
            "question": "Two\n\nparagraphs: why?",
            "choices": {"text": ["ratio 1:2 of a", "none, really"], "label": ["A", "B"]},
            "answerKey": "B",
        }
    ]


def test_quotes_carriage_returns_and_marks(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes('\ufefflabel\tcontent\r\n1\t"open\r\n\r\n0\t``close"\r\n'.encode())
    assert [document["sentence"] for document in sst2(tmp_path / "a.tsv")] == ['"open', '``close"']
    (tmp_path / "anatomy_dev.csv").write_bytes(b'"two\r\nlines",NA,"a, b",None,1,D\r\n')
    (document,) = mmlu(tmp_path / "anatomy_dev.csv")
    assert document["question"] == "two\r\nlines" and document["choices"] == ["NA", "a, b", "None", "1"]
    assert document["answer"] == 3 and document["subject"] == "anatomy"


def test_pairs_that_a_chain_of_sentences_connects_are_one_cluster(tmp_path: Path) -> None:
    ids = [("1", "2"), ("3", "4"), ("4", "5"), ("6", "7"), ("5", "1"), ("8", "7")]
    rows = "".join(f"1\t{one}\t{two}\tsome\tother\n" for one, two in ids)
    (tmp_path / "a.txt").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + rows)
    clusters = [document["cluster"] for document in mrpc(tmp_path / "a.txt")]
    assert len({clusters[number] for number in (0, 1, 2, 4)}) == 1 == len({clusters[3], clusters[5]})
    assert clusters[0] != clusters[3]


def test_wikitext_sections_and_equations_start_no_article(tmp_path: Path) -> None:
    text = " \n = One = \n \n Text . \n = = Section = = \n a = b \n = c\n = = = Sub = = = \n = Two = \n More . \n"
    (tmp_path / "wiki.test.raw").write_text(text)
    pages = [document["page"] for document in wikitext(tmp_path / "wiki.test.raw")]
    assert [page.split("\n")[0] for page in pages] == [" = One = ", " = Two = "]
    assert " \n" + "\n".join(pages) == text


def test_a_stock_file_that_lm_eval_lacks() -> None:
    with pytest.raises(UserError, match=r"lm-eval 0\.\S+ has no task file arc/arc_hard\.yaml in "):
        stock_config("arc/arc_hard.yaml")


OWN = """\
task: capitals
class: !function eval.local_task.LocalTask
documents: !function eval.local_data.unchanged
files: {test: capitals.jsonl}
source: written by us
test_split: test
output_type: multiple_choice
doc_to_text: "What is the capital of {{country}}?"
doc_to_choice: cities
doc_to_target: right
metric_list: [{metric: acc}]
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "capitals.jsonl").write_text('{"country": "Kenya", "cities": ["Nairobi", "Accra"], "right": 0}\n')
    (tmp_path / "capitals.yaml").write_text(OWN)
    section = Eval(tasks=["capitals"], task_folders=[str(tmp_path)], data_folder=str(tmp_path))
    (task,) = leaf_tasks(load_tasks(section))
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=0) == "What is the capital of Kenya?"
    assert task.doc_to_choice(task.eval_docs[0]) == ["Nairobi", "Accra"]
    (tmp_path / "capitals.yaml").write_text(OWN.replace("source: written by us\n", ""))
    with pytest.raises(UserError, match=r"capitals: the task file lacks source \(see eval/local_task\.py\)"):
        load_tasks(section)
