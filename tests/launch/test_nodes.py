"""Two nodes of two processes, whose disks are their own: the results of one node, files where they belong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("nodes_worker.py")
RECIPE = """
name: tiny
seed: 3
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{rank: 4, alpha: 8, target_modules: [q_proj, down_proj], dropout: {{rate: 0.5, instances: 2}}}}
data:
  train: [{{path: {folder}/rows.jsonl, prompt: "{{{{ instruction }}}}\\nAnswer:"}}]
  max_length: 32
training: {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, learning_rate: 1.0e-2, report_to: [],
           gradient_checkpointing: false, save_strategy: steps, save_steps: 1, optim: adamw_torch}}
distributed: {{zero: 2}}
eval: {{tasks: [choice], task_folders: [{folder}], batch_size: 2, systems: [deterministic], keep_answers: false}}
"""
TASK = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
doc_to_text: question
output_type: multiple_choice
doc_to_choice: [" house", " river", " old dog"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    "She went to the",
    "In the morning the children saw a",
    "He",
    "The old man never",
    "Once a",
    "All the",
    "A",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pocket_base: Path) -> Path:
    """Two nodes train and evaluate; one node of four trains; one process evaluates; the two nodes start again;
    the data lies on one node alone."""
    folder = tmp_path_factory.mktemp("nodes")
    draw = random.Random(random.randrange(10**6))
    numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(30)]
    rows = [{"instruction": f"Add {a} and {b}.", "input": "", "output": str(a + b)} for a, b in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"question": question, "answer": number % 3} for number, question in enumerate(QUESTIONS)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "choice.yaml").write_text(TASK.format(folder=folder))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, base=pocket_base))
    job: dict[str, Any] = {"recipe": str(folder / "recipe.yaml"), "stages": ["train"], "nodes": 1, "ranks": 4}
    jobs = [
        {**job, "nodes": 2, "ranks": 2, "folder": str(folder / "two"), "stages": ["train", "evaluate"]},
        {**job, "folder": str(folder / "one")},
        {**job, "ranks": 1, "folder": str(folder / "one"), "stages": ["evaluate"]},
        {**job, "nodes": 2, "ranks": 2, "folder": str(folder / "two")},
        {**job, "nodes": 2, "ranks": 2, "folder": str(folder / "bad"), "last": ["data.train.0.path=/no/rows.jsonl"]},
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "jobs.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    logs = "".join(log.read_text()[-3000:] for log in sorted(folder.glob("*/*.log")))
    assert process.returncode == 0, process.stderr[-3000:] + logs
    statuses = json.loads(process.stdout.splitlines()[-1])
    assert statuses[:3] == [[0] * 4, [0] * 4, [0]], logs
    (folder / "statuses.json").write_text(json.dumps(statuses))
    return folder


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_nodes_train_what_one_trains(work: Path) -> None:
    two, one = (work / name / "node-0" / "outputs" / "tiny" for name in ("two", "one"))
    assert len(losses(two)) == 2 and losses(two) == losses(one)
    name = "adapter_model.safetensors"
    assert (two / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.slow
def test_each_node_tokenises_once_and_the_first_process_alone_writes_the_run(work: Path) -> None:
    logs = {rank: (work / "two" / f"{rank}.log").read_text() for rank in range(4)}
    said = [sum(logs[rank].count("tokenising the data on") for rank in ranks) for ranks in ((0, 1), (2, 3))]
    assert said == [1, 1], logs
    caches = [list((work / "two" / f"node-{node}" / "cache").glob("*/rows/entry.json")) for node in range(2)]
    assert [len(found) for found in caches] == [1, 1]
    elsewhere = [path for path in (work / "two" / "node-1").rglob("*") if path.is_file()]
    kept = [path for path in elsewhere if path.relative_to(work / "two" / "node-1").parts[0] != "cache"]
    assert all(path.parent.name == "ranks" for path in kept), kept  # heartbeats and logs of its own processes


@pytest.mark.slow
def test_the_evaluation_is_shared_out_over_both_nodes_and_gives_the_answers_of_one_process(work: Path) -> None:
    """Seven documents over four ranks; on the second node the adapter is found through the first."""

    def answers(name: str) -> list[Any]:
        (file,) = (work / name / "node-0" / "eval").glob("tiny/*-*/samples_*.jsonl")
        return [(d["doc_id"], d["resps"], d["acc"]) for d in map(json.loads, file.open())]

    assert [number for number, *_ in answers("two")] == list(range(len(QUESTIONS)))
    assert answers("two") == answers("one")
    assert not (work / "two" / "node-1" / "eval").exists()


@pytest.mark.slow
def test_a_run_goes_on_only_where_every_node_sees_it(work: Path) -> None:
    """Started again, the first node finds the run, and the second nothing."""
    assert json.loads((work / "statuses.json").read_text())[3] == [2] * 4
    said = (work / "two" / "0.log").read_text()
    assert "is not the same on all nodes" in said and "(process 2): no finished run, no checkpoint\n" in said, said
    assert "(process 1): a finished run, a checkpoint after step 2\n" in said


@pytest.mark.slow
def test_what_one_node_lacks_ends_all(work: Path) -> None:
    """Else the other nodes would wait for it until the process group gives up."""
    assert json.loads((work / "statuses.json").read_text())[4] == [2] * 4
    for rank in range(4):
        said = (work / "bad" / f"{rank}.log").read_text()
        assert "data.train.0.path: found '/no/rows.jsonl', which does not exist" in said
        assert ("(process 2 on " in said) == (rank != 3) and "Traceback" not in said, said
