"""Good recipes: extends, paths, overrides, and the way back to YAML."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe import Recipe, RecipeError, load_recipe, recipe_to_yaml
from pipeline.recipe.nodes import read_text
from pipeline.recipe.problems import Place

MINIMAL = {"name": "m", "base": {"model": "b"}, "data": {"train": [{"path": "d"}]}}


def written(folder: Path, values: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def read(text: str) -> Any:
    node, problems = read_text(text, Place(None))
    assert not problems
    return node.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("+1.5", 1.5), ("-3", -3), ("0x1F", 31), ("0o17", 15),
        ("017", 17), ("1_000", "1_000"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("no", "no"), ("on", "on"),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("'null'", "null"),
        ("[1, a, {b: no}]", [1, "a", {"b": "no"}]), ("1e", "1e"), ("-", [None]), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    result = read(text)
    assert result == value
    assert type(result) is type(value)


def test_not_a_number_and_infinities() -> None:
    assert math.isnan(read(".nan"))
    assert read("-.inf") == -math.inf


def test_keys_are_text() -> None:
    assert read("{1: a, no: b, null: c}") == {"1": "a", "no": "b", "null": "c"}


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    written(
        tmp_path,
        {
            "name": "grandparent",
            "seed": 1,
            "base": {"model": "b", "dtype": "float32"},
            "data": {"train": [{"path": "one"}, {"path": "two"}], "max_length": 64},
            "training": {"learning_rate": 1e-3, "max_steps": 5},
        },
        "deep/grandparent.yaml",
    )
    written(tmp_path, {"extends": "deep/grandparent.yaml", "name": "parent", "seed": 2}, "parent.yaml")
    path = written(
        tmp_path,
        {
            "extends": "parent.yaml",
            "name": "child",
            "data": {"train": [{"path": "three"}]},
            "training": {"learning_rate": 2e-3},
        },
    )
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.base.dtype) == ("child", 2, "float32")
    assert [source.path for source in recipe.data.train] == ["three"]
    assert recipe.data.max_length == 64
    assert recipe.training == {"learning_rate": 2e-3, "max_steps": 5}


def test_problems_name_the_file_they_stand_in(tmp_path: Path) -> None:
    parent = written(tmp_path, {**MINIMAL, "sed": 1}, "parent.yaml")
    child = written(tmp_path, "extends: parent.yaml\nname: child\nsede: 2\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(child, ["seeed=3"])
    places = [str(problem.place) for problem in caught.value.problems]
    assert places[0].startswith(f"{parent}:")
    assert places[1:] == [f"{child}:3", "command line"]


def test_extends_problems(tmp_path: Path) -> None:
    cases = {
        "a.yaml": ("extends: b.yaml\nname: a\n", "recipes extend each other in a circle"),
        "c.yaml": ("name: c\nextends: base.yml\n", "no such file; did you mean"),
        "d.yaml": ("extends: [base.yaml]\nname: d\n", "found a list of 1, expected the path of one recipe"),
        "e.yaml": ("extends: base.yaml\n", "a recipe that extends another needs a name of its own"),
        "f.yaml": ("extends: f.yaml\nname: f\n", "in a circle"),
    }
    written(tmp_path, MINIMAL, "base.yaml")
    written(tmp_path, "extends: a.yaml\nname: b\n", "b.yaml")
    for name, (text, expected) in cases.items():
        path = written(tmp_path, text, name)
        with pytest.raises(RecipeError, match=r"extends|name") as caught:
            load_recipe(path)
        assert expected in str(caught.value), name
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "c.yaml")
    assert str(caught.value.problems[0]).startswith(
        f"{tmp_path / 'c.yaml'}:2: extends: {tmp_path / 'base.yml'}: no such"
    )


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(
        tmp_path,
        {
            "name": "p",
            "base": {"model": "../base", "tokenizer": "owner/model"},
            "data": {
                "train": [{"path": "./a.json"}, {"path": "b.json"}],
                "validation": {"source": {"path": "./v.json"}},
            },
            "eval": {"tasks": ["mmlu", "./t.yaml"], "task_folders": ["."], "data_folder": "./data"},
        },
        "library/parent.yaml",
    )
    path = written(
        tmp_path,
        {"extends": "../library/parent.yaml", "name": "c", "data": {"validation": {"source": {"path": "./w.json"}}}},
        "mine/child.yaml",
    )
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe(Path("../mine/child.yaml"), ["data.train.1.path=./c.json", "output=./here"])
    assert load_recipe(path, ["base.model=~/b"]).base.model == str(tmp_path / "home" / "b")
    assert recipe.base.model == str(tmp_path / "base")
    assert recipe.base.tokenizer == "owner/model"
    assert [source.path for source in recipe.data.train] == [str(tmp_path / "library/a.json"), str(working / "c.json")]
    assert recipe.data.validation is not None
    assert recipe.data.validation.source is not None
    assert recipe.data.validation.source.path == str(tmp_path / "mine/w.json")
    assert recipe.eval.tasks == ["mmlu", str(tmp_path / "library/t.yaml")]
    assert recipe.eval.task_folders == [str(tmp_path / "library")]
    assert recipe.eval.data_folder == str(tmp_path / "library/data")
    assert recipe.output == "./here"  # a folder to write, from the working directory wherever it is said
    assert path.exists()
    assert load_recipe(path).data.train[0].path == str(tmp_path / "library/a.json")


def test_overrides_reach_into_lists_optional_sections_and_sections_not_written(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    recipe = load_recipe(
        path,
        [
            "data.train.0.path=x=y.json",
            "data.validation.fraction=0.25",
            "training.learning_rate=1e-3",
            "eval.tasks=[a, b]",
            "adapter.dropout.rate=0.25",
            "adapter.dropout.rate=0.125",
        ],
    )
    assert recipe.data.train[0].path == "x=y.json"
    assert recipe.data.validation is not None
    assert recipe.data.validation.fraction == 0.25
    assert recipe.training == {"learning_rate": 1e-3}
    assert recipe.eval.tasks == ["a", "b"]
    assert recipe.adapter.dropout.rate == 0.125  # the last one counts


def test_the_tree_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.adapter.dropout.rate = 0.1  # type: ignore[misc]


text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20) | st.sampled_from(
    [
        "no",
        "1e5",
        "0o17",
        "1_000",
        "null",
        "~",
        "",
        " x ",
        "a: b",
        "# c",
        "- d",
        "'e'",
        "2e-4",
        "yes",
        ".nan",
        "\n",
        "x\n",
    ]
)
path_text = text.filter(lambda value: not value.startswith((".", "~/")) and value != "")  # absolute once read
numbers = st.floats(allow_nan=False, allow_infinity=False)
sources = st.fixed_dictionaries(
    {"path": path_text},
    optional={
        "prompt": text,
        "subset": text | st.none(),
        "limit": st.integers(1, 10**9) | st.none(),
        "columns": st.dictionaries(st.sampled_from(["instruction", "input", "output"]), text),
    },
)
recipes = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
        "base": st.fixed_dictionaries({"model": path_text}, optional={"revision": text}),
        "data": st.fixed_dictionaries({"train": st.lists(sources, min_size=1, max_size=3)}),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "output": text,
        "adapter": st.fixed_dictionaries(
            {
                "alpha": st.floats(min_value=1e-300, max_value=1e300),
                "rank": st.integers(1, 4096),
                "target_modules": st.just("all-linear") | st.lists(text, min_size=1, max_size=3),
                "dropout": st.fixed_dictionaries({"rate": st.floats(0, 1, exclude_max=True)}),
            }
        ),
        "training": st.fixed_dictionaries(
            {}, optional={"learning_rate": st.floats(0, 1e300), "project": text, "max_steps": st.integers(-1, 10**15)}
        ),
        "eval": st.fixed_dictionaries({"tasks": st.lists(path_text, max_size=3)}),
    },
)


@settings(deadline=None, max_examples=150)
@given(recipes)
def test_the_resolved_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    path = tmp_path_factory.mktemp("round") / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@settings(deadline=None, max_examples=150)
@given(
    value=st.one_of(numbers, st.integers(1 - 10**18, 10**18 - 1), st.booleans(), st.none(), text),
    index=st.integers(0, 1),
)
def test_an_override_sets_the_value_that_yaml_reads(
    tmp_path_factory: pytest.TempPathFactory, value: Any, index: int
) -> None:
    """Any scalar, written as YAML 1.2, arrives as it is: in the open `training` of the tree, and in a list."""
    from pipeline.recipe.loader import COMMAND_LINE, _with_overrides
    from pipeline.recipe.nodes import Yaml12Dumper, node_of

    root = node_of({"a": {"b": [1, 2]}, "c": {}}, COMMAND_LINE)
    written_value = yaml.dump(value, Dumper=Yaml12Dumper, width=10**6).removesuffix("\n...\n").removesuffix("\n")
    problems: list[Any] = []
    changed = _with_overrides(root, [f"a.b.{index}={written_value}", f"c.d={written_value}"], problems).plain()
    assert not problems
    expected = [1, 2]
    expected[index] = value
    assert changed == {"a": {"b": expected}, "c": {"d": value}}


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_override_is_taken_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    path = tmp_path_factory.getbasetemp() / "minimal.yaml"
    if not path.exists():
        written(path.parent, MINIMAL, path.name)
    try:
        load_recipe(path, [override])
    except RecipeError as error:
        assert "command line" in str(error)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda value: value.encode("utf-8", "surrogatepass")))
def test_any_file_is_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert os.path.relpath(path) in str(caught.value) or str(path) in str(caught.value)
