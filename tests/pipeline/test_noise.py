"""Gradient noise of a recipe: the whole measurement at a trained adapter, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from training_support import random_rows, write_rows
from transformers import AutoModelForCausalLM

from pipeline.adapter.files import save_adapter, settings_of
from pipeline.errors import UserError
from pipeline.noise.report import in_words, plot, print_noise
from pipeline.noise.run import BreakEven, Effort, measure_noise
from pipeline.recipe import Recipe, load_recipe

RECIPE = """
name: noisy
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 2, dropout: {{rate: 0.5}}}}
data: {{train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}} ="}}], max_length: 48}}
"""
SMALL = Effort(grids=2, grid_examples=2, grid_masks=2, examples=2, repeats=3)


@pytest.fixture
def recipe(tmp_path: Path, small_base: Path) -> Recipe:
    write_rows(tmp_path / "rows.jsonl", random_rows(12, seed=3, longest=9))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, base=small_base))
    return load_recipe(tmp_path / "recipe.yaml")


def test_measures_a_saved_adapter_and_says_what_it_found(recipe: Recipe, small_base: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(small_base)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    found = measure_noise(recipe, tmp_path / "adapter", SMALL, said.append)

    assert found.rows == 12 and found.parameters > 0 and found.rate == 0.5
    names = [one.setting.name for one in found.equal_examples]
    assert names[:4] == ["instance N = 1", "instance N = 2", "instance N = 4", "instance N = 8"]
    assert {one.setting.examples for one in found.equal_examples} == {2}
    assert {one.setting.passes for one in found.equal_compute} == {8}
    assert all(one.measured.value > 0 for one in [*found.equal_examples, *found.equal_compute])
    assert [one.predicted is None for one in found.equal_examples] == [name.startswith("balanced") for name in names]
    assert "grid 2/2" in said and "example n = 4, B = 2" in said
    written = json.loads(json.dumps(found.to_json()))
    assert written["equal_compute"][0]["setting"] == {"sampling": "instance", "instances": 1, "examples": 8}

    screen = StringIO()
    print_noise(found, Console(file=screen, width=160, no_color=True))
    assert "interaction, V_xm" in screen.getvalue() and "equal compute, 8 rows" in screen.getvalue()
    plot(found, tmp_path / "noise.svg")
    assert "</svg>" in (tmp_path / "noise.svg").read_text()
    drowned = replace(found, break_even={4: BreakEven(float("inf"), 30.0, float("inf"))})
    assert drowned.to_json()["break_even"] == {4: {"examples": None, "low": 30.0, "high": None}}
    assert "from infinitely many examples per micro-batch on (95 % interval 30 to" in in_words(drowned)[0]


def test_refusals(recipe: Recipe, small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter here"):
        measure_noise(recipe, tmp_path, SMALL, print)
    folder = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_base), LoraConfig(r=2, target_modules=["q_proj"]))
    other = settings_of(recipe.adapter.model_copy(update={"alpha": 3.0}), seed=0)
    folder.mkdir()
    save_adapter(model, get_peft_model_state_dict(model), other, folder)
    with pytest.raises(UserError, match=r"adapter\.alpha: trained with 3\.0"):
        measure_noise(recipe, folder, SMALL, print)
    (folder / "lora_dropout.json").unlink()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="truncated"):
        measure_noise(recipe, folder, SMALL, print)
    plain = recipe.adapter.model_copy(update={"dropout": recipe.adapter.dropout.model_copy(update={"rate": 0.0})})
    with pytest.raises(UserError, match=r"adapter\.dropout\.rate: found 0"):
        measure_noise(recipe.model_copy(update={"adapter": plain}), None, SMALL, print)


def test_the_command_explains_itself(repository: Path) -> None:
    said = subprocess.run(
        [sys.executable, repository / "launch" / "noise.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--adapter" in said.stdout and "--json" in said.stdout
