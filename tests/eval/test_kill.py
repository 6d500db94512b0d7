"""Evaluations that are killed go on where they stopped, with equal results; and several processes answer as one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import with_adapter

from eval.lm.sharing import share
from pipeline.adapter.files import AdapterSettings, load_adapter, save_adapter
from pipeline.base import load_base
from pipeline.recipe import recipe_to_yaml
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, Recipe, Source

TASKS = ["tiny_choice", "tiny_last", "tiny_text", "tiny_words"]
WORKER = Path(__file__).with_name("evaluation_worker.py")


def ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``adapter``, and room for recipes and results."""
    folder = tmp_path_factory.mktemp("killed")
    model = with_adapter(load_base(Base(model=str(tiny_base), quantization="none", dtype="float32")))
    model.peft_config["default"].base_model_name_or_path = str(tiny_base)
    settings = AdapterSettings(rate=0.5, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)
    (folder / "adapter").mkdir()
    save_adapter(model, get_peft_model_state_dict(model), settings, folder / "adapter")
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    return folder


def recipe_file(folder: Path, tiny_base: Path, task_folder: Path, name: str, **section: Any) -> Path:
    recipe = Recipe(
        name=name,
        base=Base(model=str(tiny_base), quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path=str(folder / "rows.jsonl"))]),
        eval=Eval(**{"tasks": TASKS, "task_folders": [str(task_folder)], "ensemble": Ensemble(instances=3), **section}),
    )
    file = folder / f"{name}.yaml"
    file.write_text(recipe_to_yaml(recipe))
    return file


def contents(run: Path) -> dict[str, str]:
    """Every sample as it was written."""
    return {file.name: file.read_text() for file in sorted(run.glob("samples_*.jsonl"))}


@pytest.fixture(scope="module")
def jobs(folder: Path, tiny_base: Path, task_folder: Path) -> dict[str, tuple[Path, dict[str, Any], str]]:
    """Output, what the worker says, and the log of each job."""
    draw = random.Random()  # another moment in every run of this suite
    fast = {"systems": ["ensemble"], "batch_size": 2, "mode": "fast", "tokens_per_pass": 60}
    both = {**fast, "systems": ["deterministic", "ensemble"]}
    exact = {"systems": ["deterministic"], "batch_size": 2, "mode": "exact"}
    settings = {"fast-1": both, "fast-2": fast, "exact-2": exact, "long-2": {**fast, "tasks": ["too_long"]}}
    shutil.copytree(task_folder, folder / "tasks")
    long = (task_folder / "tiny_choice.yaml").read_text().replace("task: tiny_choice", "task: too_long")
    documents = {"question": "the", "choices": ["old", " ".join(["river"] * 80)], "answer": 0}
    (folder / "long.jsonl").write_text(
        "".join(json.dumps({**documents, "question": word}) + "\n" for word in ("dog", "her"))
    )
    (folder / "tasks" / "too_long.yaml").write_text(
        long.replace(str(task_folder / "documents.jsonl"), str(folder / "long.jsonl"))
    )
    given = []
    for name, section in settings.items():
        given.append(
            {
                "recipe": str(recipe_file(folder, tiny_base, folder / "tasks", name, **section)),
                "adapter": str(folder / "adapter"),
                "output": str(folder / name),
                "ranks": int(name[-1]),
                "kills": sorted(draw.uniform(0.02, 0.95) for _ in range(1 if "exact" in name else 2)),
                "fails": "long" in name,
                "seed": draw.randrange(2**32),
                "log": str(folder / f"{name}.log"),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(given))
    done = ran([sys.executable, str(WORKER), str(folder / "jobs.json")])
    logs = {job["recipe"]: Path(job["log"]).read_text()[-3000:] for job in given if Path(job["log"]).exists()}
    assert done.returncode == 0, (given, done.stderr[-3000:], logs)
    said = json.loads(done.stdout)
    return {
        name: (folder / name, found, Path(job["log"]).read_text())
        for name, job, found in zip(settings, given, said, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast-1", "fast-2", "exact-2"])
def test_a_killed_evaluation_goes_on_and_ends_alike(jobs: dict[str, Any], name: str) -> None:
    """Killed twice at random moments, one write torn, one byte changed; bit for bit."""
    output, found, log = jobs[name]
    whole, killed = (output / part / name / "latest" for part in ("whole", "killed"))
    results = [json.loads((run / "results.json").read_text()) for run in (whole, killed)]
    systems = [part["lora_dropout"]["systems"] for part in results]
    assert contents(killed) == contents(whole) and len(contents(whole)) == 4 * len(systems[0])
    assert results[0]["results"] == results[1]["results"]
    for key in ("results", "analysis"):
        assert [system[key] for system in systems[0].values()] == [system[key] for system in systems[1].values()]
    assert all(system["kept"] == 0 for system in systems[0].values())
    assert found["sound"] > 0
    kept = sum(system["kept"] for system in systems[1].values())
    if name == "fast-1":
        assert kept >= found["sound"], "texts that occur twice are kept once"
        assert found["sound"] >= kept - 2 * 11
    assert log.count("warning: kept answers:") >= found["bad"] >= 1 and "computed again" in log
    for folder in (output / "killed" / name / "answers").iterdir() if "fast" in name else ():
        counts = Counter(json.loads(answer)["request"] for answer in sound_answers(folder))
        assert set(counts.values()) == {1}, "nothing that was finished was computed again"


def sound_answers(folder: Path) -> list[bytes]:
    """All that a store would trust, repeated ones too."""
    key = json.loads((folder / "settings.json").read_text())["key"]
    found = []
    for file in folder.glob("*.jsonl"):
        for line in file.read_bytes().split(b"\n"):
            answer = line[len(b'{"sha256":"') + 64 + len(b'","answer":') : -1]
            checksum = hashlib.sha256(key.encode() + answer).hexdigest()
            if line == f'{{"sha256":"{checksum}","answer":'.encode() + answer + b"}":
                found.append(answer)
    return found


def test_two_processes_answer_as_one(jobs: dict[str, Any]) -> None:
    """Every document once, in order; scores within 1e-5 of 1 + |score|."""
    alone, together = (contents(jobs[name][0] / "whole" / name / "latest") for name in ("fast-1", "fast-2"))
    assert together.keys() == {name for name in alone if "ensemble" in name}
    for name, text in ((name, alone[name]) for name in together):
        for left, right in zip(text.splitlines(), together[name].splitlines(), strict=True):
            one, other = json.loads(left), json.loads(right)
            assert one["doc_id"] == other["doc_id"] and one["arguments"] == other["arguments"]
            if "words" in name:
                assert one["resps"] == other["resps"]
                continue
            pairs = zip(one["lora_dropout"]["requests"], other["lora_dropout"]["requests"], strict=True)
            for first, second in pairs:
                scores = [torch.tensor(part["running"] + part["members"]).double() for part in (first, second)]
                torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)
        assert [json.loads(line)["doc_id"] for line in text.splitlines()] == list(range(11))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have: another number adds in another order, and the last bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_each_process_in_mode_exact_is_stock_lm_eval(
    jobs: dict[str, Any], folder: Path, tiny_base: Path, tokenizer: Any
) -> None:
    """On its share of the requests, bit for bit; stock lm-eval itself cannot run several processes on a CPU."""
    base = load_base(Base(model=str(tiny_base), quantization="none", dtype="float32"))
    stock = HFLM(pretrained=load_adapter(base, folder / "adapter"), tokenizer=tokenizer, batch_size=2)
    run = jobs["exact-2"][0] / "whole" / "exact-2" / "latest"
    kinds = {
        "loglikelihood": ["tiny_choice", "tiny_last"],
        "loglikelihood_rolling": ["tiny_text"],
        "generate_until": ["tiny_words"],
    }
    for kind, tasks in kinds.items():
        requests, found = [], []
        for task in tasks:
            for line in (run / f"samples_deterministic_{task}.jsonl").read_text().splitlines():
                sample = json.loads(line)
                for number, arguments in enumerate(sample["arguments"]):
                    place = (task, sample["doc_id"], 1)
                    requests.append(Instance(kind, {}, tuple(arguments), number, place))
                    found.append(sample["resps"][number][0])
        for rank in range(2):
            indices = share(requests, rank, 2)
            assert 0 < len(indices) < len(requests)
            answers = getattr(stock, kind)([requests[index] for index in indices], disable_tqdm=True)
            for index, answer in zip(indices, answers, strict=True):
                assert found[index] == (list(answer) if kind == "loglikelihood" else answer)


def test_what_stops_one_process_stops_all_with_its_reason(jobs: dict[str, Any]) -> None:
    _, found, log = jobs["long-2"]
    assert found["statuses"] == [1, 1]
    assert log.count("UserError: task too_long, document 0: a text to be scored has") == 2


def test_weights_that_are_not_finite_end_the_command(
    folder: Path, tiny_base: Path, task_folder: Path, tmp_path: Path, repository: Path
) -> None:
    """Status 2, the task and the document, no results and no kept answer."""
    broken = shutil.copytree(tiny_base, tmp_path / tiny_base.name)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    file = recipe_file(folder, broken, task_folder, "nan", systems=["ensemble"])
    script = str(repository / "launch" / "evaluate.py")
    command = [
        sys.executable,
        script,
        str(file),
        "--adapter",
        str(folder / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    done = ran(command)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "task tiny_" in done.stderr and "document" in done.stderr and "not a finite number" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/**/results.json")) and not list(tmp_path.glob("out/**/*.jsonl"))
