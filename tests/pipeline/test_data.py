"""Rows in every form they come in, as trl itself would prepare them, and what is said about those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from training_support import random_rows, write_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pipeline.base import load_tokenizer
from pipeline.data import PromptTemplate, load_rows, load_splits, tokenise
from pipeline.data.prompts import ALPACA
from pipeline.data.splits import content_fingerprint
from pipeline.data.tokenise import IGNORED, label_statistics, tokenised_row
from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema

ROWS = random_rows(23, seed=4)


@pytest.fixture(scope="module")
def tokenizer(pocket_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket_base)


def source(path: Path, **keys: Any) -> schema.Source:
    return schema.Source(path=str(path), **keys)


def recipe(pocket_base: Path, train: Path, validation: Path | float | None = None, **data: Any) -> Recipe:
    held_out: dict[str, Any] | None = None
    if validation is not None:
        held_out = {"fraction": validation} if isinstance(validation, float) else {"source": {"path": str(validation)}}
    return Recipe.model_validate(
        {
            "name": "t",
            "base": {"model": str(pocket_base)},
            "data": {"train": [{"path": str(train)}], "validation": held_out, "max_length": 128, **data},
        }
    )


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "folder"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "jsonl":
        write_rows(path, ROWS)
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.mkdir()
        write_rows(path / "a.jsonl", ROWS[:9])
        write_rows(path / "b.jsonl", ROWS[9:])
        (path / "README.md").write_text("no data")
    rows = load_rows([source(path)])
    assert rows.column_names == ["prompt", "completion", "row"]
    assert rows["row"] == list(range(len(ROWS)))
    assert rows["completion"] == [row["output"] for row in ROWS]
    assert rows["prompt"] == [alpaca(row["instruction"], row["input"]) for row in ROWS]


def alpaca(instruction: str, given: str) -> str:
    """The published prompt, written out by hand."""
    if given:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def test_sources_are_concatenated_and_limited(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", ROWS[:10]), write_rows(tmp_path / "b.jsonl", ROWS[10:])
    rows = load_rows([source(first, limit=3), source(second)])
    assert rows["completion"] == [row["output"] for row in ROWS[:3] + ROWS[10:]]
    assert rows["row"] == list(range(16))


def test_prompt_completion(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": "a\n", "completion": " b"}, {"prompt": "", "completion": "c"}])
    rows = load_rows([source(path, format="prompt-completion")])
    assert (rows["prompt"], rows["completion"]) == (["a\n", ""], [" b", "c"])


def test_own_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}])
    rows = load_rows([source(path, columns={"instruction": "question", "output": "answer"})])
    assert rows["prompt"] == [alpaca("1+1?", ""), alpaca("2+2?", "")]  # `input` may be absent
    assert rows["completion"] == ["2", "4"]


def test_a_template_sees_own_columns_and_the_formats_names(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"q": "1+1?", "hints": ["x", "y"], "output": "2"}])
    template = "{% for hint in hints %}{{ hint | upper }};{% endfor %} {{ q }} {{ instruction }}\n"
    rows = load_rows([source(path, columns={"instruction": "q"}, prompt=template)])
    assert rows["prompt"] == ["X;Y; 1+1? 1+1?\n"]


def test_a_missing_input_is_empty_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"instruction": "a", "input": None, "output": "b"}, ROWS[0]])
    assert load_rows([source(path)])["prompt"][0] == alpaca("a", "")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(instruction=text, given_input=text)
@example(instruction="{{ input }} {% if %}", given_input="{# #}")
def test_columns_are_rendered_as_they_are(instruction: str, given_input: str) -> None:
    """Nothing in a row is taken for template code, escaped or stripped."""
    rendered = PromptTemplate(schema.Source(path="x")).render({"instruction": instruction, "input": given_input})
    assert rendered == alpaca(instruction, given_input)
    assert ALPACA.count("{{") == 2


def test_tokens_and_labels_are_trls_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*random_rows(30, seed=1), {"instruction": "x", "input": "", "output": "ends by itself</s>"}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    assert_equals_trl(load_rows([source(path)]), tokenizer, max_length=80, folder=tmp_path)
    # merges across the boundary of prompt and completion, and prompts without a space
    glued = load_rows([source(path, prompt="{{ instruction }} answ")])
    assert_equals_trl(glued, tokenizer, max_length=80, folder=tmp_path)


def test_tokens_and_labels_are_trls_own_for_a_llama_2_tokenizer(shared: Path, tmp_path: Path) -> None:
    """SentencePiece-like, adds BOS by itself."""
    path = write_rows(tmp_path / "r.jsonl", random_rows(20, seed=2))
    tokenizer = load_tokenizer(schema.Base(model=str(shared / "base" / "stories3M")))
    tokenised = assert_equals_trl(load_rows([source(path)]), tokenizer, max_length=100, folder=tmp_path)
    plain = tokenizer("a")["input_ids"]
    assert (tokenised[0]["input_ids"][0] == tokenizer.bos_token_id) == (plain[0] == tokenizer.bos_token_id)


def assert_equals_trl(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path
) -> datasets.Dataset:
    ours = tokenise(rows, tokenizer, max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(output_dir=str(folder / "trl"), max_length=max_length, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    kept = [i for i, labels in enumerate(ours["labels"]) if any(label != IGNORED for label in labels)]
    theirs = trainer.train_dataset
    assert ours.select(kept)["input_ids"] == theirs["input_ids"]
    assert ours.select(kept)["labels"] == theirs["labels"]
    return ours


@settings(max_examples=100, deadline=None)
@given(prompt=text, completion=text, max_length=st.integers(1, 60))
def test_labels_are_the_tokens_or_ignored_and_the_completion_is_last(
    pocket_base: Path, prompt: str, completion: str, max_length: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_base)
    row = tokenised_row(prompt, completion, tokenizer, max_length)
    ids, labels = row["input_ids"], row["labels"]
    assert len(ids) == len(labels) <= max_length
    trained = [label != IGNORED for label in labels]
    assert trained == sorted(trained)  # the prompt first, then nothing but completion
    assert all(label == token for label, token in zip(labels, ids, strict=True) if label != IGNORED)
    whole = tokenizer(prompt + completion + ("" if completion.endswith("</s>") else "</s>"))["input_ids"]
    assert ids == whole[:max_length]
    assert row["truncated"] == (len(whole) > max_length)
    if not row["truncated"]:
        assert labels[-1] == tokenizer.eos_token_id


def test_a_missing_pad_token_is_handled_and_eos_stays_a_label(small_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    config = json.loads(settings_file.read_text())
    for name in ("pad_token", "unk_token"):  # then EOS pads
        config[name] = None
    settings_file.write_text(json.dumps(config))
    loaded = load_tokenizer(schema.Base(model=str(folder)))
    assert loaded.pad_token_id == loaded.eos_token_id is not None
    row = tokenised_row("a b", " c", loaded, 32)
    assert row["labels"][-1] == loaded.eos_token_id
    from pipeline.data.packing import RowCollator

    short = tokenised_row("a", " b", loaded, 32)
    batch = RowCollator(pad_token_id=loaded.pad_token_id)(
        [{**row, "row": 5}, {"input_ids": short["input_ids"][:3], "labels": short["labels"][:3], "row": 2}]
    )
    assert batch["row"] == [5, 2]
    assert batch["labels"][0, -1] == loaded.eos_token_id  # the sequence's own
    padding = batch["attention_mask"][1] == 0
    assert padding.any() and (batch["labels"][1][padding] == IGNORED).all()


def test_a_fraction_is_held_out_by_seed(pocket_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(tmp_path / "r.jsonl", random_rows(40, seed=3))
    splits = load_splits(recipe(pocket_base, path, 0.25), tokenizer)
    again = load_splits(recipe(pocket_base, path, 0.25), tokenizer)
    assert splits.validation is not None and splits.probe is not None
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    assert set(splits.train["row"]).isdisjoint(splits.validation["row"])
    assert set(splits.probe["row"]) <= set(splits.train["row"])
    assert splits.train["row"] == again.train["row"]
    other = load_splits(recipe(pocket_base, path, 0.25).model_copy(update={"seed": 1}), tokenizer)
    assert other.train["row"] != splits.train["row"]
    assert splits.sources[0]["rows"] == 30 and splits.sources[0]["sha256"] != splits.sources[1]["sha256"]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    write_rows(tmp_path / "c.jsonl", ROWS[::-1])
    first, second, third = (
        content_fingerprint(load_rows([source(tmp_path / name)])) for name in ("a.jsonl", "b.json", "c.jsonl")
    )
    assert first == second != third
    glued = [{"prompt": "ab", "completion": "c"}], [{"prompt": "a", "completion": "bc"}]
    assert content_fingerprint(glued[0]) != content_fingerprint(glued[1])


def test_few_untrained_rows_are_dropped_and_counted(
    pocket_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"instruction": "say", "input": "", "output": "yes"} for _ in range(200)]
    rows[17]["instruction"] = "word " * 200  # fills max_length by itself
    path = write_rows(tmp_path / "r.jsonl", rows)
    splits = load_splits(recipe(pocket_base, path), tokenizer)
    assert len(splits.train) == 199 and 17 not in splits.train["row"]
    assert splits.statistics.untrained_rows == [17] and splits.dropped == {"training": [17]}
    assert (splits.statistics.rows, splits.statistics.truncated_rows) == (200, 1)


def test_many_untrained_rows_are_an_error_that_lists_them(
    pocket_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"instruction": "say", "input": "", "output": "yes"} for _ in range(200)]
    for index in (3, 17, 150):
        rows[index]["instruction"] = "word " * 200
    path = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError) as error:
        load_splits(recipe(pocket_base, path), tokenizer)
    message = str(error.value)
    assert "data.train: 3 of 200 rows have no trained token (rows 4, 18, 151); at most 1% may" in message
    assert "raise data.max_length" in message
    good = write_rows(tmp_path / "good.jsonl", rows[4:16])
    with pytest.raises(UserError, match=r"data\.validation: 3 of 200 rows"):
        load_splits(recipe(pocket_base, good, path), tokenizer)


def test_label_statistics_count_what_is_predicted() -> None:
    rows = datasets.Dataset.from_list(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "truncated": False, "row": 0},
            {"input_ids": [1, 2, 3, 4], "labels": [1, IGNORED, IGNORED, IGNORED], "truncated": True, "row": 7},
        ]
    )
    statistics = label_statistics(rows)
    assert (statistics.tokens, statistics.trained_tokens) == (7, 2)
    assert statistics.untrained_rows == [7]  # its only label is the first token, which nothing predicts


def test_a_validation_source_is_named_by_its_key(tmp_path: Path, pocket_base: Path) -> None:
    good, bad = write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"^data\.validation\.source: .* has the columns text"):
        load_splits(recipe(pocket_base, good, bad), AutoTokenizer.from_pretrained(pocket_base))


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_an_empty_split_is_refused(pocket_base: Path, tmp_path: Path, fraction: float) -> None:
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    with pytest.raises(UserError, match=f"data.validation.fraction: {fraction} of 23 rows leaves one split empty"):
        load_splits(recipe(pocket_base, path, fraction), AutoTokenizer.from_pretrained(pocket_base))


def message_of(path: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        load_rows([source(path, **keys)])
    return str(error.value)


def test_malformed_json_lines_name_file_and_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[11] = '{"instruction": "a", "input": "", "output": b"}'
    path.write_text("\n".join(lines))
    message = message_of(path)
    assert str(path) in message and "row 12 (line 12, column" in message and "malformed JSON" in message


def test_a_malformed_json_array_names_file_row_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    broken = json.dumps(ROWS[:5], indent=1).replace('"output"', 'output"', 1)
    path.write_text(broken)
    message = message_of(path)
    assert str(path) in message and "row 1 (line 5, column" in message


def test_the_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": \n')
    message = message_of(tmp_path)
    assert str(tmp_path / "b.jsonl") in message and "row 2" in message


def test_a_row_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": "b"}\n[1, 2]\n')
    assert "row 2: found list, expected an object" in message_of(path)


def test_a_missing_column_says_what_there_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"question": "a", "answer": "b"}])
    message = message_of(path)
    assert "has the columns question, answer" in message and "needs instruction, output" in message
    assert "data.train.0.columns" in message
    assert "needs prompt" in message_of(path, format="prompt-completion", columns={"completion": "answer"})


def test_a_completion_that_is_no_text_names_its_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"instruction": "1+1", "output": 2}, {"instruction": "2+2", "output": 4}])
    assert f"{path}, row 1: 'output' is int, expected text" in message_of(path)
    path = write_rows(tmp_path / "n.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}])
    assert f"{path}, row 2: 'output' is NoneType, expected text" in message_of(path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ instruction ", "not a Jinja2 template"),
        ("{{ question }}", "'question' is undefined; the row has the columns"),
        ("{{ instruction + 1 }}", "can only concatenate str"),
        (
            "{{ instruction.__class__.__mro__ }}",
            "access to attribute '__class__'",
        ),
    ],
)
def test_a_template_that_cannot_be_rendered(tmp_path: Path, template: str, expected: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    message = message_of(path, prompt=template)
    assert message.startswith("data.train.0.prompt: ") and expected in message


@pytest.mark.parametrize("content", ["[]", "", " \n"])
def test_an_empty_source(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    message = message_of(path)
    assert f"data.train.0.path: '{path}'" in message and "has no rows" in message


def test_an_empty_parquet_source(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    datasets.Dataset.from_dict({"instruction": [], "output": []}).to_parquet(path)
    assert "has no rows" in message_of(path)


def test_a_missing_file_and_a_file_of_another_kind(tmp_path: Path) -> None:
    assert "data.train.0.path" in message_of(tmp_path / "no.json") and "does not exist" in message_of(
        tmp_path / "no.json"
    )
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert "is no .json, .jsonl, .parquet file" in message_of(tmp_path / "rows.csv")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_rows(mixed / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(mixed / "b.parquet")
    assert "mixes json and parquet files" in message_of(mixed)
