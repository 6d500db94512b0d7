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
from safetensors.torch import load_file
from training_support import random_rows, write_rows
from transformers import AutoModelForCausalLM

from pipeline.adapter.config import lora_config
from pipeline.adapter.files import save_adapter, settings_of, without_false_warnings
from pipeline.errors import UserError
from pipeline.noise.components import Estimate, Setting
from pipeline.noise.report import BELOW_ZERO, in_words, plot, print_noise, title
from pipeline.noise.run import BreakEven, Comparison, Effort, Noise, measure_noise
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
    assert "grid 2 of 2" in said and "steps 7 of 11: example n = 4, B = 2" in said
    written = json.loads(json.dumps(found.to_json()))
    assert written["equal_compute"][0]["setting"] == {"sampling": "instance", "instances": 1, "examples": 8}

    screen = StringIO()
    print_noise(found, Console(file=screen, width=160, no_color=True))
    assert "interaction, V_xm" in screen.getvalue() and "equal compute, 8 rows" in screen.getvalue()
    assert title(found).startswith(f"noisy, adapter {tmp_path / 'adapter'}, p = 0.5, ")
    assert title(replace(found, rates=(0.1, 0.3))).split(", ")[2:4] == ["p = 0.1 to 0.3", "by layer"]
    plot(found, tmp_path / "noise.svg")
    drawn = (tmp_path / "noise.svg").read_text()
    assert all(words in drawn for words in ("N masks for all", "n masks per example", "reaches below 0"))
    drowned = replace(found, break_even={4: BreakEven(float("inf"), 30.0, float("inf"))})
    assert drowned.to_json()["break_even"] == {4: {"examples": None, "low": 30.0, "high": None}}
    assert "at no batch size, per micro-batch (95 % interval 30 to no batch size)" in in_words(drowned)[0]


def test_overlaps_and_negative_estimates_are_told(recipe: Recipe) -> None:
    def measured(place: int, low: float, value: float, high: float) -> Comparison:
        return Comparison(Setting("instance", place, 4), None, Estimate(value, 1.0, low, high))

    separated = [measured(1, 1.0, 2.0, 3.0), measured(2, 4.0, 5.0, 6.0)]
    near = [*separated, measured(4, -0.5, 2.5, 5.0)]
    parts = Estimate(8.0, 1.0, 6.0, 10.0), Estimate(-0.01, 0.1, -0.2, 0.2), Estimate(2.0, 0.1, 1.8, 2.2)
    found = Noise("r", "as initialised", 0.1, (0.1, 0.1), 9, 7, *parts, {}, near, separated, SMALL)
    compute, examples = in_words(found)
    assert compute == (
        "At equal compute the quietest measured is instance N = 1, B = 4; "
        "the noisiest, instance N = 2, has 2.50 times its variance."
    )
    assert "instance N = 1, B = 4, not separated from instance N = 4 (intervals overlap);" in examples
    screen = StringIO()
    print_noise(found, Console(file=screen, width=100, no_color=True))
    assert screen.getvalue().startswith("r, adapter as initialised, p = 0.1, 7 parameters\n")
    assert screen.getvalue().count(BELOW_ZERO) == 1 and " 0 % " in screen.getvalue() and "-0 %" not in screen.getvalue()


def test_adalora_saved_and_as_initialised(recipe: Recipe, small_base: Path, tmp_path: Path) -> None:
    """Ranks that training left, a layer without any among them; the rank numbers are no parameters."""
    adapter = recipe.adapter.model_copy(update={"method": "adalora"})
    own = recipe.model_copy(update={"adapter": adapter})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_base), lora_config(adapter))
    parameters = [name for name, _ in model.named_parameters() if "lora_E" in name]
    names = [name.removeprefix("base_model.model.").removesuffix(".default") for name in parameters]
    config, rank = model.peft_config["default"], adapter.initial_rank
    left = [0, *[1] * (len(names) - 1)]
    config.rank_pattern = {
        name: [place < kept for place in range(rank)] for name, kept in zip(names, left, strict=True)
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    whole = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    with without_false_warnings():
        save_adapter(model, get_peft_model_state_dict(model), settings_of(adapter, seed=0), folder)

    with pytest.raises(UserError, match=r"adapter\.method: trained with adalora, the recipe has lora"):
        measure_noise(recipe, folder, SMALL, print)
    assert measure_noise(own, None, SMALL, print).parameters == whole
    found = measure_noise(own, folder, SMALL, print)
    stored = load_file(folder / "adapter_model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in stored.values()) < whole
    assert all(one.measured.value > 0 for one in found.equal_examples)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plot", "x.gif"], "--plot: found 'x.gif', expected a name that ends in .svg, .png or .pdf"),
        (["--json", "/nowhere/x.json"], "--json: the folder /nowhere does not exist"),
        (["--json", "/tmp"], "--json: /tmp is a folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused_first(
    arguments: list[str],
    expected: str,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(repository), *sys.path])  # the command replaces the first
    monkeypatch.setattr(sys, "argv", ["noise.py", "no-such-recipe.yaml", *arguments])
    from launch.command import run_command
    from launch.noise import noise

    with pytest.raises(SystemExit) as ended:
        run_command(noise)
    assert ended.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


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
