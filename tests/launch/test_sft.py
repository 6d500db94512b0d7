"""launch/sft.py as a user starts it: under each launcher, interrupted, and with bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from safetensors.torch import load_file

SCRIPTS = Path(sys.executable).parent

RECIPE = """
name: tiny
seed: 3
output: {folder}/outputs
base: {{model: {base}, quantization: nf4, dtype: bfloat16}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: 0.5, instances: 2, sampling: instance}}}}
data:
  train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}\\nAnswer:"}}]
  validation: {{fraction: 0.2, probe_rows: 4}}
  max_length: 32
training: {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, eval_strategy: steps, eval_steps: 2,
           gradient_checkpointing: false, save_strategy: "no", optim: adamw_torch}}
distributed: {{zero: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    draw = random.Random(0)
    numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(30)]
    rows = [{"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, base=pocket_base))
    return path


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",  # deepspeed compiles with the ninja that lies there
    }


LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()],
    "torchrun": [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "accelerate": [str(SCRIPTS / "accelerate"), "launch", "--cpu", "--num_processes", "1"],
}
ENGINES = {
    "python": ("one process, no DeepSpeed", 1),
    "deepspeed": ("DeepSpeed ZeRO-2", 2),
    "torchrun": ("DeepSpeed ZeRO-2", 2),
    "accelerate": ("one process, no DeepSpeed", 1),
}


def sft(repository: Path, launcher: str, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHERS[launcher], str(repository / "launch" / "sft.py"), str(recipe), *arguments]
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
    assert said.count("adapter written to") == 1  # by one rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sent"),
    [("python", signal.SIGINT), ("deepspeed", signal.SIGINT)],  # the deepspeed launcher makes SIGTERM of it
    ids=["python", "deepspeed"],
)
def test_ctrl_c_keeps_a_checkpoint_and_says_so(
    repository: Path, recipe: Path, launcher: str, sent: signal.Signals
) -> None:
    """The signal goes to the whole process group, as a terminal sends it; launchers then add their own."""
    name = f"{launcher}-{sent.name}"
    longer = ["training.max_steps=100000", "training.eval_strategy=no", "data.validation=null"]
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "launch/sft.py", str(recipe), f"name={name}", "--no-eval", *longer],
        env=environment(),
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = recipe.parent / "outputs" / name
    deadline = time.monotonic() + 200
    while not (folder / "history.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, sent)
    output, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    checkpoints = [int(path.name.removeprefix("checkpoint-")) for path in (folder / "checkpoints").glob("checkpoint-*")]
    assert len(checkpoints) == 1, errors[-3000:]
    assert f"Interrupted at step {checkpoints[0]}; checkpoints are in {folder / 'checkpoints'}" in output
    checkpoint = folder / "checkpoints" / f"checkpoint-{checkpoints[0]}"
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 6 * 7 * 2
    assert not (folder / "adapter_model.safetensors").exists()  # an unfinished run does not look finished
    if launcher == "python":
        assert process.returncode == 130 and "Traceback" not in errors


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
