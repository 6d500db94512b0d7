"""Bad recipes: what the user reads. Each case is a recipe and a part of the one line that answers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.recipe import RecipeError, load_recipe

GOOD = """\
name: good
base:
  model: ./base
adapter:
  rank: 8
data:
  train:
    - path: rows.json
"""


def messages(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, one per problem."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert isinstance(caught.value, UserError)
    return [str(problem) for problem in caught.value.problems]


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_good_recipe_loads(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD))
    assert (recipe.name, recipe.adapter.rank, recipe.data.train[0].path) == ("good", 8, "rows.json")


@pytest.mark.parametrize(
    ("added", "line", "expected"),
    [
        ("adaptr: {rank: 4}", 9, "adaptr: unknown key (found a mapping with rank), expected one of name, seed, output"),
        ("adaptr: {rank: 4}", 9, "did you mean adapter?"),
        ("rank: 4", 9, "did you mean adapter.rank?"),
        ("learning_rate: 2e-4", 9, "did you mean training.learning_rate?"),
        ("distributed: {zero: 4}", 9, "distributed.zero: found 4, expected one of 0, 1, 2, 3"),
        ("distributed: {zero: two}", 9, "distributed.zero: found the text 'two', expected one of 0, 1, 2, 3"),
        ("distributed: 3", 9, "distributed: found 3, expected a mapping with keys among zero, offload"),
        ("seed: -1", 9, "seed: found -1, expected a whole number of at least 0 and below 4294967296"),
        ("seed: '7'", 9, "seed: found the text '7', expected a whole number of at least 0 and below 4294967296; write"),
        ("seed: 7.0", 9, "seed: found 7.0, expected a whole number of at least 0 and below 4294967296; write 7"),
        ("eval:\n  tasks: mmlu", 10, "eval.tasks: found the text 'mmlu', expected a list, each text; a list of one is"),
        ("eval:\n  systems: [base, ensembles]", 10, "eval.systems.1: found the text 'ensembles', expected one of base"),
        ("eval:\n  systems: [base, ensembles]", 10, "did you mean ensemble?"),
        ("eval:\n  ensemble:\n    instances: 0", 11, "eval.ensemble.instances: found 0, expected a whole number of at"),
        ("eval: {limit: many}", 9, "eval.limit: found the text 'many', expected a whole number of at least 1, or null"),
        ("output: 3", 9, "output: found 3, expected text"),
        ("output:", 9, "output: found nothing (null), expected text"),
        ("training: []", 9, "training: found an empty list, expected a mapping"),
    ],
)
def test_added_line(tmp_path: Path, added: str, line: int, expected: str) -> None:
    path = written(tmp_path, GOOD + added + "\n")
    (message,) = messages(path)
    assert message.startswith(f"{path}:{line}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.dropout.rate=1.0", "adapter.dropout.rate: found 1.0, expected a number of at least 0 and below 1"),
        ("adapter.dropout.rate=-0.1", "found -0.1, expected a number of at least 0 and below 1"),
        ("adapter.dropout.rate=.nan", "found nan, expected a number of at least 0 and below 1"),
        ("adapter.dropout.rate=half", "found the text 'half', expected a number of at least 0 and below 1"),
        ("adapter.dropout.rate=", "found nothing (null), expected a number of at least 0 and below 1"),
        ("adapter.dropout.instances=0", "found 0, expected a whole number of at least 1"),
        ("adapter.dropout.instances=2.5", "found 2.5, expected a whole number of at least 1"),
        ("adapter.dropout.rescale=yes", "found the text 'yes', expected true or false; write true"),
        ("adapter.dropout.rat=0.1", "unknown key (found 0.1), expected one of rate, instances, sampling, execution"),
        ("adapter.dropout.rat=0.1", "did you mean adapter.dropout.rate?"),
        ("adapter.alpha=.inf", "found inf, expected a number above 0"),
        (
            "adapter.target_modules=q_proj",
            "found the text 'q_proj', expected all-linear, or a list of at least 1, each text",
        ),
        ("adapter.target_modules=[q_proj, 3]", "adapter.target_modules.1: found 3, expected text"),
        ("base.quantization=nf8", "expected one of nf4, int8, none; did you mean nf4?"),
        ("base.quantisation=nf4", "did you mean base.quantization?"),
        ("name=a/b", "found the text 'a/b', expected letters, digits, dots, dashes and underscores"),
        ("data.train.1.path=x", "data.train.1.path: found '1' as the index into data.train, expected 0"),
        ("data.train.first.path=x", "found 'first' as the index into data.train, expected 0"),
        ("data.train=[]", "data.train: found an empty list, expected a list of at least 1, each a mapping with keys"),
        ("data.train.0.columns={instrution: q}", "the format alpaca has the columns instruction, input, output"),
        ("name.first=x", "name.first: name is the text 'good', which has no keys"),
        ("data.train.0.path={", "data.train.0.path: not valid YAML: a list or mapping that is not closed"),
        ("adapter={rank: 1, rank: 2}", "adapter.rank: the key is written twice"),
        ("rank 3", "found 'rank 3', expected key=value, e.g. adapter.dropout.rate=0.3"),
        ("=3", "found '=3', expected key=value"),
        ("adapter..rank=3", "found 'adapter..rank=3', expected key=value"),
        ("extends=x.yaml", "extends: what a recipe extends is written in the recipe"),
        # contradictions
        ("adapter.input_dropout=0.1", "adapter.input_dropout: found 0.1 beside adapter.dropout.rate 0.5; the two"),
        ("data.validation={}", "data.validation: found neither, expected exactly one of fraction"),
        (
            "data.validation={fraction: 0.1, source: {path: a}}",
            "data.validation.fraction: found both, expected exactly",
        ),
        ("distributed.offload=all", "distributed.offload: all needs distributed.zero 3, found 1"),
    ],
)
def test_override(tmp_path: Path, override: str, expected: str) -> None:
    (message,) = messages(written(tmp_path, GOOD), override)
    assert message.startswith("command line: ")
    assert expected in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["base.quantization=int8", "distributed.zero=3"], "zero 3 cannot shard base.quantization int8"),
        (["distributed.offload=optimizer", "distributed.zero=0"], "needs distributed.zero 1, 2 or 3, found 0"),
        (["adapter.dropout={rate: 0, instances: 4}"], "at rate 0 all 4 instances are the same model"),
        (["adapter.dropout={rate: 0, initial_rate: 0.5}"], "a rate that ends at 0 leaves no masks for the ensemble"),
        (["adapter.dropout={balanced: true}"], "one instance has nothing to be balanced with"),
        (["adapter.dropout={initial_rate: 0.1, rescale: false}"], "a rate that changes needs rescale: true"),
        (["base={model: a, attention: flash_attention_2, dtype: float32}"], "computes in 16 bit only"),
    ],
)
def test_contradiction(tmp_path: Path, overrides: list[str], expected: str) -> None:
    (message,) = messages(written(tmp_path, GOOD), *overrides)
    assert expected in message


def test_all_problems_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = """\
nam: x
base: {modell: m, dtype: bf16}
adapter:
  input_dropout: 0.1
  dropout: {rate: 1.5}
data:
  train:
    - format: alpacca
  validation: {}
  max_length: long
distributed: {zero: 0, offload: optimizer}
training: {max_length: 3, learning_rte: 1}
"""
    path = written(tmp_path, text)
    found = messages(path, "seed=x")
    assert [message.removeprefix(str(path)).partition(" ")[0] for message in found] == [
        ":1:", ":1:", ":2:", ":2:", ":2:", ":5:", ":8:", ":8:", ":9:", ":10:", ":11:", ":12:", ":12:", "command",
    ]  # fmt: skip
    everything = "\n".join(found)
    for part in (
        "name: missing; expected letters, digits",
        "nam: unknown key (found the text 'x')",
        "base.model: missing; expected text",
        "did you mean base.model?",
        "did you mean bfloat16?",
        "adapter.dropout.rate: found 1.5",
        "data.train.0.path: missing",
        "did you mean alpaca?",
        "data.validation: found neither",
        "data.max_length: found the text 'long'",
        "distributed.offload: optimizer needs distributed.zero 1, 2 or 3, found 0",
        "training.max_length: not set here (found 3): set data.max_length",
        "did you mean training.learning_rate?",
    ):
        assert part in everything
    assert "input_dropout" not in everything  # whether it contradicts depends on a rate that is not known


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("name: a\n\tbase: b\n", 2, "a tab; indent with spaces"),
        ("name: a\nbase: {model: b\n", 3, "a mapping that is not closed; expected a comma or }"),
        ("name: a\nbase: model: b\n", 2, "a second `: ` where one value was expected"),
        ("name: a\nbase\nseed: 1\n", 3, "a line without `: ` where a key was expected; write `key: value`"),
        ("name: 'a\n", 2, "close the quote"),
        ("a: &x 1\nb: *x\n", 1, "found &x; anchors and aliases are not read: write the value out"),
        ("b: *x\n", 1, "found *x; anchors and aliases are not read"),
        ("a: !!python/object/apply:os.system [echo]\n", 1, "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("---\nname: a\n---\nname: b\n", 3, "a second document (---)"),
        ("a: " + "[" * 30 + "]" * 30 + "\n", 1, "nested more than 20 levels deep"),
        ("- name: a\n", 1, "found a list of 1, expected a mapping of keys to values"),
        ("", 1, "found nothing (null), expected a mapping of keys to values"),
        ("# only a comment\n", 1, "found nothing (null), expected a mapping"),
        ("name: a\0b\n", 1, "the character U+0000 is not allowed"),
        ("a: " + "x" * 300_000, 1, "expected a recipe of at most 262,144"),
    ],
)
def test_malformed_file(tmp_path: Path, text: str, line: int, expected: str) -> None:
    path = written(tmp_path, text)
    (message,) = messages(path)
    assert message.startswith(f"{path}:{line}: ")
    assert expected in message


def test_keys_written_twice_are_all_named(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "adapter:\n  rank: 9\nseed: 1\nseed: 2\n")
    first, second = messages(path)
    assert first == f"{path}:9: adapter: the key is written twice; first on line 4. Keep one of them"
    assert second == f"{path}:12: seed: the key is written twice; first on line 11. Keep one of them"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: a\noutput: caf\xe9\n")
    assert messages(path) == [f"{path}:2: byte 0xe9 is not UTF-8 text; save the file as UTF-8"]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "alpaca.yaml")
    (tmp_path / "pocket").mkdir()
    written(tmp_path / "pocket", GOOD, "demo.yaml")
    assert messages(tmp_path / "alpacca.yaml") == [
        f"{tmp_path / 'alpacca.yaml'}: no such file; did you mean {tmp_path / 'alpaca.yaml'}?"
    ]
    (message,) = messages(tmp_path / "demo.yaml")
    assert str(tmp_path / "pocket" / "demo.yaml") in message
    (message,) = messages(tmp_path / "no-such-folder" / "demo.yaml")
    assert "no such file" in message
    (message,) = messages(tmp_path)
    assert "found a folder, expected a recipe file; it holds alpaca.yaml" in message


def test_places_are_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, GOOD + "sed: 1\n")
    monkeypatch.chdir(tmp_path)
    (message,) = messages(Path("recipe.yaml"))
    assert message.startswith("recipe.yaml:9: sed: unknown key (found 1)")
    assert message.endswith("did you mean seed?")
