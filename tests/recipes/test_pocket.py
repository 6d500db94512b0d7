"""The pocket recipe's data and recipes: reproducible, and no leak from test to training."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.recipe import load_recipe

FILES = ["train.jsonl", "test_iid.jsonl", "test_shift.jsonl"]
POCKET_RECIPES = ["pocket.yaml", "pocket-lora.yaml"]


@pytest.fixture(scope="module")
def pocket(repository: Path) -> Path:
    return repository / "recipes" / "pocket"


@pytest.fixture(scope="module")
def regenerated(pocket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a copy of the generator ran, in an interpreter of its own."""
    folder = tmp_path_factory.mktemp("pocket")
    shutil.copy(pocket / "generate.py", folder)
    subprocess.run([sys.executable, "-I", folder / "generate.py"], check=True, cwd=folder)
    return folder


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "data" / file).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def held_out(pocket: Path) -> set[str]:
    """Every word of the generator's held-out side."""
    specification = importlib.util.spec_from_file_location("pocket_generate", pocket / "generate.py")
    assert specification is not None and specification.loader is not None
    generate = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = generate  # dataclasses look their module up
    specification.loader.exec_module(generate)
    _, side = generate.vocabulary_sides()
    lists = [*side.kinds.values(), side.names, side.things, side.good, side.bad, side.opposites]
    return words(" ".join(word for each in lists for word in each))


@pytest.mark.parametrize("file", FILES)
def test_the_generator_rewrites_the_data_byte_for_byte(pocket: Path, regenerated: Path, file: str) -> None:
    assert (regenerated / "data" / file).read_bytes() == (pocket / "data" / file).read_bytes()


def test_training_rows_are_balanced_alpaca_rows(pocket: Path) -> None:
    training = rows(pocket, "train.jsonl")
    families = Counter(row["family"] for row in training)
    assert len(families) == 9
    assert set(families.values()) == {225}
    for row in training:
        assert set(row) == {"instruction", "input", "output", "family"}
        assert row["input"] == ""
        assert re.fullmatch(r" [A-Za-z0-9]+( [A-Za-z]+)?", row["output"]), row
        assert re.fullmatch(r"[A-Za-z0-9 ,.!?:]+", row["instruction"]), row


def test_no_question_is_asked_twice(pocket: Path) -> None:
    questions = Counter(row["instruction"] for file in FILES for row in rows(pocket, file))
    assert questions.most_common(1)[0][1] == 1


def test_held_out_words_are_never_seen_in_training(pocket: Path, held_out: set[str]) -> None:
    assert len(held_out) > 120
    for file in ("train.jsonl", "test_iid.jsonl"):
        seen = {word for row in rows(pocket, file) for word in words(row["instruction"] + row["output"])}
        assert not seen & held_out


def test_shifted_questions_ask_with_held_out_words_only(pocket: Path, held_out: set[str]) -> None:
    """Each one has a held-out word, and every word of it is held out or is part of a question's fixed wording."""
    # fixed wording: what most training questions of the family share
    wording: dict[str, set[str]] = {}
    training = rows(pocket, "train.jsonl")
    for family in {row["family"] for row in training}:
        counts = Counter(word for row in training if row["family"] == family for word in words(row["instruction"]))
        wording[family] = {word for word, count in counts.items() if count >= 20}
    for row in rows(pocket, "test_shift.jsonl"):
        asked = words(row["instruction"])
        assert asked & held_out, row
        assert asked <= held_out | wording[row["family"]], row


@pytest.mark.parametrize("file", FILES[1:])
def test_choices_are_distinct_and_hold_the_answer(pocket: Path, file: str) -> None:
    for row in rows(pocket, file):
        if row["choices"]:
            assert len(set(row["choices"])) == len(row["choices"]) >= 2, row
            assert row["choices"].count(row["output"]) == 1, row


def test_the_position_of_the_answer_tells_nothing(pocket: Path) -> None:
    """Choosing by place among the choices is no better than chance, within three standard errors."""
    for file in FILES[1:]:
        for family in ("kind", "opposite", "review", "owner"):
            asked = [row for row in rows(pocket, file) if row["family"] == family]
            chance = 1 / len(asked[0]["choices"])
            stderr = (chance * (1 - chance) / len(asked)) ** 0.5
            places = Counter(row["choices"].index(row["output"]) for row in asked)
            assert max(places.values()) / len(asked) < chance + 3 * stderr, (file, family, places)


@pytest.mark.parametrize("name", POCKET_RECIPES)
def test_pocket_recipes_find_their_files_from_any_folder(
    pocket: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(pocket / name)
    assert (Path(recipe.base.model) / "model.safetensors").is_file()
    assert all(Path(source.path).is_file() for source in recipe.data.train)
    assert all(Path(folder).is_dir() for folder in recipe.eval.task_folders)


def test_the_two_pocket_recipes_differ_in_lora_dropout_only(pocket: Path) -> None:
    ours, plain = (load_recipe(pocket / name).model_dump() for name in POCKET_RECIPES)
    assert ours["adapter"]["dropout"]["rate"] > 0
    assert plain["adapter"]["dropout"]["rate"] == 0
    assert (ours["eval"]["mode"], plain["eval"]["mode"]) == ("auto", "fast"), "scored alike: ours has an ensemble"
    for recipe in (ours, plain):
        del recipe["name"], recipe["adapter"]["dropout"]
        del recipe["eval"]["systems"], recipe["eval"]["mode"]
    assert ours == plain
