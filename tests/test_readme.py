"""What the README says is true: its commands run, its tree exists, its recipe lines load."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ports import free_port

README = Path(__file__).resolve().parents[1] / "README.md"
SCRIPTS = Path(sys.executable).parent

# For each command in the README: what makes it small and offline. {run} is a run folder, {base} the pocket base. The
# Alpaca recipe trains in two ranks under ZeRO-3, and the same processes then evaluate without the engine.
SMALL_ALPACA = (
    "base.model={base} data.train.0.path={rows} data.train.0.limit=40 data.max_length=128 training.max_steps=2 "
    "training.eval_steps=2 training.gradient_accumulation_steps=1 training.save_strategy=no distributed.zero=3 "
    "output={runs} eval.limit=3 eval.ensemble.instances=2 "
    "eval.tasks=[{repository}/recipes/pocket/tasks/pocket_choice.yaml]"
)
COMMANDS = {
    "make demo": "in .ci/run",
    "make test": "in .ci/run",
    ". .venv/bin/activate": "by make",
    "python launch/check.py recipes/alpaca.yaml": "as the command in test_check.py",
    "deepspeed launch/sft.py recipes/alpaca.yaml": SMALL_ALPACA + " name=readme",
    "deepspeed launch/sft.py recipes/alpaca.yaml base.model=../llama-2-7b data.train.0.path=mine.jsonl "
    "adapter.dropout.rate=0.3": "as the command before it, whose overrides are more",
    'python launch/ask.py outputs/pocket "Which number comes after 41?"': "as the command in test_ask.py",
    "python launch/evaluate.py recipes/pocket/pocket.yaml eval.ensemble.instances=4": (
        "as the command in test_evaluate.py"
    ),
    "python launch/harness.py --model lora-dropout --model_args peft=outputs/pocket,instances=8 --tasks "
    "recipes/pocket/tasks/pocket_choice.yaml": "as the command in test_lm_command.py",
    "python launch/compare.py eval/outputs/pocket/latest:deterministic eval/outputs/pocket/latest:ensemble": (
        "as the command in test_compare_command.py"
    ),
    "python launch/export.py outputs/pocket": "as the command below, which does more",
    "python launch/export.py outputs/pocket --form merged": "--output {runs}/merged --max-shard-size 5MB",
    "python launch/export.py outputs/pocket --form ensemble --instances 8": "as the command in test_export_command.py",
    "python launch/benchmark.py --shape width-1024 --layers 4 --tokens 64": "as the command in test_benchmark.py",
    "python launch/benchmark.py --level evaluation --shape width-512 --layers 4": "as the command in test_benchmark.py",
    "python launch/noise.py recipes/pocket/pocket.yaml": "as the command in test_noise.py",
    "python launch/benchmark.py --level checkpoint recipes/pocket/pocket.yaml": "as the command in test_benchmark.py",
    "python launch/benchmark.py --level traffic --shape llama2-7b --layers 4": "as the command, whose result is kept",
    "python launch/status.py outputs/*": "as the command in test_status.py",
    "python launch/submit.py recipes/alpaca.yaml --nodes 2 --gpus 4 --time 8:00:00": "as the command in test_submit.py",
    "python launch/submit.py recipes/alpaca.yaml --gpus 1 --array seeds=0:5 --evaluate separate": (
        "as the command in test_submit.py"
    ),
    "deepspeed --hostfile hosts launch/sft.py recipes/alpaca.yaml": "as the command in test_nodes.py",
    "python launch/schema.py": "",
}


def readme_commands() -> list[str]:
    """Lines of the README's code blocks and of its inline code that start a program of ours, comments cut."""
    text = README.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(python launch/[^`]+)`", text)
    starts = ("python ", "deepspeed ", "make ", ". ")
    return list(dict.fromkeys(re.sub(r"\s+# .*", "", line).strip() for line in lines if line.startswith(starts)))


def test_every_command_is_known_here() -> None:
    assert sorted(readme_commands()) == sorted(COMMANDS)


def test_ci_runs_the_two_commands(repository: Path) -> None:
    lines = (repository / ".ci" / "run").read_text().splitlines()
    assert {"make demo", "make test"} <= set(lines)


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, repository: Path, pocket_base: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((repository / "recipes" / "pocket" / "data" / "test_iid.jsonl").read_text())
    for name in ("launch", "recipes"):  # a working directory of its own: results are written relative to it
        (tmp_path / name).symlink_to(repository / name)
    values = {"base": pocket_base, "rows": rows, "runs": tmp_path, "repository": repository}
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"
    outputs = {}
    for command, small in COMMANDS.items():
        if not command.startswith(("python launch", "deepspeed")) or small.startswith("as the command"):
            continue
        command = command.replace(" outputs/pocket", f" {tmp_path / 'readme'}")
        command = command.replace("deepspeed ", f"deepspeed --num_gpus 2 --master_port {free_port()} ")
        program, *arguments = shlex.split(f"{command} {small.format(**values)}")
        done = subprocess.run(
            [str(SCRIPTS / program), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        outputs[arguments[-1]] = done.stdout
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    said = "".join(outputs.values())
    assert "generalisation gap" in said  # the log line
    assert f"adapter written to {tmp_path / 'readme'}" in said
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    for form in ("md", "html"):
        assert (tmp_path / "eval" / "outputs" / "readme" / "latest" / f"report.{form}").exists()


def test_the_tree_exists(repository: Path) -> None:
    tree = README.read_text().split("## The rooms")[1].split("```")[1]
    folder = ""
    for line in filter(str.strip, tree.splitlines()):
        names = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        folder = "" if not line.startswith(" ") else folder
        for name in names.split():
            assert (repository / folder / name).exists(), line
        folder = names if not line.startswith(" ") else folder


def test_the_recipe_lines_load() -> None:
    block = re.search(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert block is not None
    from pipeline.recipe.schema import Data

    data = Data.model_validate(yaml.safe_load(block[1])["data"])
    assert data.train[0].columns == {"instruction": "question", "output": "answer"}
