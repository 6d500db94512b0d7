"""launch/sft.py as a user starts it: under each launcher, and with bad input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sft_support import LAUNCHERS, environment, launched_by, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("sft"), pocket_base)


ENGINES = {
    "python": ("one process, no DeepSpeed", 1),
    "deepspeed": ("DeepSpeed ZeRO-2", 2),
    "torchrun": ("DeepSpeed ZeRO-2", 2),
    "accelerate": ("one process, no DeepSpeed", 1),
}


def sft(repository: Path, launcher: str, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*launched_by(launcher), str(repository / "launch" / "sft.py"), str(recipe), *arguments]
    return subprocess.run(command, env=environment(), cwd=repository, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_and_writes_the_run(repository: Path, recipe: Path, launcher: str) -> None:
    process = sft(repository, launcher, recipe, f"name={launcher}", "--no-eval")
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    folder = recipe.parent / "outputs" / launcher
    engine, processes = ENGINES[launcher]

    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 6 * 7 * 2
    assert all(weight.any() for weight in weights.values())  # B has moved from zero, and nothing is an empty shard
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_dropout"]) == ("LORA", 4, 0.0)
    assert json.loads((folder / "lora_dropout.json").read_text())["instances"] == 2
    assert f"name: {launcher}" in (folder / "recipe.yaml").read_text()
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["engine"], record["processes"]) == (engine, processes)
    assert record["data"][0]["rows"] == 24 and record["finished"] >= record["started"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "LoRA Dropout" in card and "generalisation gap" in card
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "loss" in line] == [1, 2]
    (measured,) = [line for line in history if "validation_loss" in line]
    assert measured["generalization_gap"] == measured["validation_loss"] - measured["probe_loss"]
    assert measured["validation_loss_stderr"] > 0 and measured["probe_loss_stderr"] > 0
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1e6 for line in history if "loss" in line)
    assert any((folder / "runs").rglob("events.out.tfevents.*"))

    said = process.stdout + process.stderr
    assert f"{2 * processes} examples per step = 2 rows x 1 accumulation x {processes} process(es)" in said
    assert "LoRA Dropout on 42 layers" in said and "each as 2 copies" in said
    assert said.count("instances: batched (auto): a step takes about ") == 1 and "CPU has " in said
    assert "step 2/2 · loss" in said and "generalisation gap" in said and "tokens/s" in said
    assert "it/s]" not in said and "s/it]" not in said  # no bars where there is no terminal
    assert said.count("adapter written to") == 1  # by one rank


def test_bad_input_exits_2_with_a_message_and_no_traceback(repository: Path, recipe: Path) -> None:
    process = sft(repository, "python", recipe, "data.train.0.path=./absent.jsonl", "name=bad", "--no-eval")
    assert process.returncode == 2
    assert "error: data.train.0.path: found" in process.stderr and "does not exist" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (recipe.parent / "outputs" / "bad").exists()


@pytest.mark.slow
def test_bad_input_under_a_launcher_is_said_once(repository: Path, recipe: Path) -> None:
    process = sft(repository, "torchrun", recipe, "adapter.target_modules=[query]", "name=bad", "--no-eval")
    assert process.returncode != 0
    said = process.stdout + process.stderr
    assert said.count("It has: down_proj, embed_tokens, gate_proj") == 1
    assert not (recipe.parent / "outputs" / "bad").exists()
