"""launch/evaluate.py as a user runs it: one process, several under the deepspeed launcher, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from ports import free_port

from pipeline.adapter.config import lora_config
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.base import load_base
from pipeline.recipe import load_recipe

RECIPE = """
name: random-adapter
seed: 3
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 4, alpha: 8, dropout: {{rate: 0.4}}}}
data: {{train: [{{path: {folder}/rows.jsonl}}]}}
eval: {{tasks: [choice, words], task_folders: [{folder}], batch_size: 2, ensemble: {{instances: 2}}}}
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
doc_to_text: question
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_choice: [" house", " river", " old dog"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WORDS = """
task: words
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ["She went to the", "In the morning the children saw a", "He", "The old man never asked for the", "Once a"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    """A recipe, two tasks over five documents, and a random adapter in ``adapter``."""
    folder = tmp_path_factory.mktemp("work")
    documents = [{"question": question, "answer": number % 3} for number, question in enumerate(QUESTIONS)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    for name, text in (("choice", CHOICE), ("words", WORDS)):
        (folder / f"{name}.yaml").write_text((COMMON + text).format(folder=folder))
    (folder / "recipes").mkdir()
    (folder / "recipes" / "r.yaml").write_text(RECIPE.format(base=pocket_base, folder=folder))
    recipe = load_recipe(folder / "recipes" / "r.yaml")
    torch.manual_seed(0)
    model = get_peft_model(load_base(recipe.base), lora_config(recipe.adapter))
    weights = {name: 0.08 * torch.randn_like(value) for name, value in get_peft_model_state_dict(model).items()}
    (folder / "adapter").mkdir()
    save_adapter(model, weights, settings_of(recipe.adapter, recipe.seed), folder / "adapter")
    return folder


def run(repository: Path, work: Path, *arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    script = str(repository / "launch" / "evaluate.py")
    if ranks is None:
        command = [sys.executable, script]
    else:
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--num_gpus", str(ranks), "--master_port", free_port(), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": _path()}
    return subprocess.run(
        [*command, str(work / "recipes" / "r.yaml"), *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _path() -> str:
    """The launcher starts ``python`` by name of the interpreter, and ninja, from its own folder."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def answers(folder: Path) -> dict[str, list[Any]]:
    """Document, answers and score of every sample, by file."""
    return {
        file.name: [(d["doc_id"], d["resps"], d.get("acc")) for d in map(json.loads, file.open())]
        for file in sorted(folder.glob("samples_*.jsonl"))
    }


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(repository: Path, work: Path) -> None:
    """Five documents over two ranks: an odd number, no repeats, the documents' order, one writer."""
    alone = run(repository, work, "--adapter", "adapter", "--output", "alone")
    assert alone.returncode == 0, alone.stderr
    shared = run(repository, work, "--adapter", "adapter", "--output", "shared", ranks=2)
    assert shared.returncode == 0, shared.stderr
    folders = [work / name / "random-adapter" / "latest" for name in ("alone", "shared")]
    beside = [file.name for file in (work / "shared" / "random-adapter").iterdir()]
    assert len(beside) == 3 and {"latest", "answers"} < set(beside), "one folder of results"
    one, two = (answers(folder) for folder in folders)
    assert one.keys() == two.keys() and len(one) == 6
    for name, samples in one.items():
        assert [document for document, _, _ in two[name]] == list(range(len(QUESTIONS)))
        for (_, first, _), (_, second, _) in zip(samples, two[name], strict=True):
            if "words" in name:
                assert first == second
            else:  # lm-eval writes numbers as text; other batch neighbours round otherwise
                numbers = [[float(resps[0][0]) for resps in found] for found in (first, second)]
                assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    scores = [json.loads((folder / "results.json").read_text())["lora_dropout"] for folder in folders]
    assert scores[1]["provenance"]["evaluation"]["processes"] == 2
    for system in ("base", "deterministic", "ensemble"):
        assert scores[0]["systems"][system]["results"] == scores[1]["systems"][system]["results"]
    assert "results and report written to shared/random-adapter/" in shared.stdout
    assert shared.stdout.count("Evaluating the base without adapter (1 of 3)") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nowhere"], "nowhere: no adapter here (found: no such folder)"),
        (["--adapter", "adapter", "eval.ensemble.instances=0"], "eval.ensemble.instances"),
    ],
)
def test_bad_input_ends_with_status_2_and_no_traceback(
    repository: Path, work: Path, arguments: list[str], message: str
) -> None:
    done = run(repository, work, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_help_is_instant_and_names_every_option(repository: Path, work: Path) -> None:
    done = run(repository, work, "--help")
    assert done.returncode == 0
    assert "--adapter" in done.stdout and "--output" in done.stdout and "local_rank" not in done.stdout
