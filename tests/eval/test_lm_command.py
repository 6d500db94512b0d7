"""lm-eval's own command line with the model lora-dropout: stock where it can be, ours elsewhere, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from peft import get_peft_model_state_dict

from eval.lm import command
from eval.lm.arguments import ARGUMENTS, help_text, model_arguments
from eval.lm.command import NAME, LoraDropoutLM, with_our_tasks
from eval.run import evaluate
from launch.command import BAD_INPUT
from launch.harness import main
from pipeline.adapter.files import SETTINGS_FILE, AdapterSettings, save_adapter
from pipeline.errors import UserError
from pipeline.recipe import recipe_to_yaml
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, Recipe, Source
from pipeline.run.folder import RECIPE_FILE

TASKS = ["tiny_choice", "tiny_words", "tiny_text"]


@pytest.fixture(scope="module")
def recipe(pocket_base: Path, task_folder: Path) -> Recipe:
    return Recipe(
        name="tiny",
        base=Base(model=str(pocket_base), quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path="unused.json", prompt="{{ instruction }}\nAnswer:")]),
        eval=Eval(
            tasks=TASKS,
            task_folders=[str(task_folder)],
            systems=["ensemble"],
            ensemble=Ensemble(instances=3, average="probabilities", balanced=True),
            batch_size=4,
        ),
    )


@pytest.fixture(scope="module")
def adapter(adapted: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random adapter as training would leave it, with its recipe."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = AdapterSettings(rate=0.5, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)
    adapted.model.peft_config["default"].base_model_name_or_path = recipe.base.model
    save_adapter(adapted.model, get_peft_model_state_dict(adapted.model), settings, folder)
    (folder / RECIPE_FILE).write_text(recipe_to_yaml(recipe))
    return folder


@pytest.fixture
def foreign(adapter: Path, tmp_path: Path) -> Path:
    """The same weights as an adapter of stock peft: no settings, no recipe."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for file in adapter.iterdir():
        if file.name not in (RECIPE_FILE, SETTINGS_FILE):
            (folder / file.name).symlink_to(file)
    return folder


def evaluated(model: str | LM, task_folder: Path, model_args: str = "", **arguments: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=arguments.pop("tasks", TASKS),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
        batch_size=4,
        device="cpu",
        **arguments,
    )
    assert results is not None
    return dict(results)


def answers(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Every log-likelihood and text by task, as lm-eval writes them: as text."""
    return {task: [_as_text(sample["resps"]) for sample in found] for task, found in samples.items()}


def _as_text(value: Any) -> Any:
    return [_as_text(item) for item in value] if isinstance(value, list | tuple) else str(value)


def written(folder: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    return {task: [json.loads(line) for line in next(folder.glob(pattern.format(task=task))).open()] for task in TASKS}


@pytest.mark.slow
def test_the_real_command_gives_the_numbers_of_launch_evaluate(
    repository: Path, adapter: Path, recipe: Recipe, task_folder: Path, tmp_path: Path
) -> None:
    command_line = ["--model", NAME, "--model_args", f"peft={adapter},instances=3", "--tasks", *TASKS]
    flags = ["--include_path", str(task_folder), "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(repository / "launch" / "harness.py"), *command_line, *flags, "--log_samples"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"{NAME}: the ensemble of 3 balanced masked adapters, average of probabilities; mode fast; base "
        f"{recipe.base.model} (float32); adapter {adapter}; masks of rate 0.5 and seed 7"
    ) in done.stdout
    ours = evaluate(recipe, adapter, tmp_path / "results", progress=False)
    assert ours is not None
    expected = written(ours, "samples_ensemble_{task}.jsonl")
    assert answers(written(tmp_path / "out", "*/samples_{task}_*.jsonl")) == answers(expected)


def test_without_an_ensemble_it_is_stock_lm_evals_hf(adapter: Path, recipe: Recipe, task_folder: Path) -> None:
    base = f"pretrained={recipe.base.model},dtype=float32"
    stock = evaluated("hf", task_folder, f"{base},peft={adapter}")
    ours = evaluated(NAME, task_folder, f"peft={adapter}")
    assert answers(ours["samples"]) == answers(stock["samples"])  # bit for bit
    assert ours["results"] == stock["results"]
    alone = evaluated(NAME, task_folder, base, tasks=["tiny_choice"])
    expected = evaluated("hf", task_folder, base, tasks=["tiny_choice"])
    assert answers(alone["samples"]) == answers(expected["samples"])
    assert answers(alone["samples"])["tiny_choice"] != answers(ours["samples"])["tiny_choice"]


def test_a_base_is_quantised_on_the_way_which_hf_cannot(recipe: Recipe, task_folder: Path) -> None:
    base = f"pretrained={recipe.base.model}"
    lm = LoraDropoutLM.create_from_arg_string(f"{base},quantization=nf4,dtype=float32", {"batch_size": "2"})
    kinds = {type(module).__name__ for module in lm.model.modules()}
    assert "Linear4bit" in kinds
    assert lm.batch_size == 2
    found = evaluated(lm, task_folder, tasks=["tiny_choice"])
    assert found["results"]["tiny_choice"]["sample_len"] == 11


def test_one_member_another_seed_and_a_foreign_adapter_with_a_rate(
    adapter: Path, foreign: Path, recipe: Recipe, task_folder: Path, capsys: Any
) -> None:
    base = f"pretrained={recipe.base.model},dtype=float32,average=probabilities"
    arguments = {
        "own": f"peft={adapter},instances=1,balanced=False",
        "same": f"peft={foreign},{base},instances=1,rate=0.5,mask_seed=7",
        "other": f"peft={adapter},instances=1,balanced=False,mask_seed=8",
    }
    found = {
        name: answers(evaluated(NAME, task_folder, text, tasks=["tiny_choice"])["samples"])
        for name, text in arguments.items()
    }
    assert found["own"] == found["same"] != found["other"]
    warning = f"warning: {foreign} comes without lora_dropout.json, the record of a training with LoRA Dropout; its "
    warning += "ensemble is drawn with rate 0.5, and masks at test time only are worse than none."
    assert warning in capsys.readouterr().out


def test_answers_are_kept_and_taken_up(adapter: Path, task_folder: Path, tmp_path: Path, capsys: Any) -> None:
    text = f"peft={adapter},instances=2,answers={tmp_path}"
    first = LoraDropoutLM.create_from_arg_string(text, {"batch_size": 4, "device": "cpu"})
    expected = evaluated(first, task_folder)
    [file] = tmp_path.glob("*/*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[3][:-9], b"\n", *lines[4:]]))
    again = LoraDropoutLM.create_from_arg_string(text, {"batch_size": 4, "device": "cpu"})
    assert answers(evaluated(again, task_folder)["samples"]) == answers(expected["samples"])
    assert (first.kept, again.kept, len(lines)) == (0, len(lines) - 1, first.requests)
    warning = f"warning: kept answers: {file}, line 4: the checksum does not match; what it held is computed again"
    assert warning in capsys.readouterr().out


def test_in_mode_exact_answers_of_an_evaluation_with_other_batches_do_not_stand_in(
    adapter: Path, task_folder: Path, tmp_path: Path
) -> None:
    def found(text: str, limit: int | None) -> tuple[dict[str, Any], int]:
        lm = LoraDropoutLM.create_from_arg_string(f"peft={adapter}{text}", {"batch_size": 4, "device": "cpu"})
        return answers(evaluated(lm, task_folder, tasks=TASKS[:1], limit=limit)["samples"]), lm.kept

    kept = f",answers={tmp_path}"
    expected, _ = found("", None)
    found(kept, 7)
    assert found(kept, None)[0] == expected  # bit for bit
    assert found(kept, None) == (expected, 3 * 11)


def test_the_chat_template_is_the_prompt_of_training(adapter: Path, task_folder: Path) -> None:
    lm = LoraDropoutLM.create_from_arg_string(f"peft={adapter}", {"batch_size": 4, "device": "cpu"})
    assert lm.chat_template(True) == "{instruction}\nAnswer:"
    found = evaluated(lm, task_folder, tasks=["tiny_words"], apply_chat_template=True, fewshot_as_multiturn=True)
    for sample in found["samples"]["tiny_words"]:
        assert sample["arguments"][0][0] == f"{sample['doc']['question']}\nAnswer:"
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    assert lm.apply_chat_template(turns[:2]) == "aa\nAnswer:"
    with pytest.raises(UserError, match="add --fewshot_as_multiturn false"):
        lm.apply_chat_template(turns)


def test_lm_evals_cache_is_refused(adapter: Path, task_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"--use_cache: (.|\n)*answers=FOLDER"):
        evaluated(NAME, task_folder, f"peft={adapter}", use_cache=str(tmp_path / "cache"), tasks=["tiny_choice"])
    for spelling in (["--use_cache", "x"], ["--use_cache=x"], ["-c", "x"]):
        monkeypatch.setattr(sys, "argv", ["lm-eval", "--model", NAME, "--tasks", "tiny_choice", *spelling])
        with pytest.raises(UserError, match="--use_cache"):
            command.main()


def test_lm_evals_pickled_requests_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """On the command line as in a file of settings."""
    (tmp_path / "settings.yaml").write_text("cache_requests: {cache_requests: true}\n")
    settings = str(tmp_path / "settings.yaml")
    for words in (["--cache_requests", "true"], ["--config", settings], [f"-C{settings}"]):
        monkeypatch.setattr(sys, "argv", ["lm-eval", "--model", NAME, "--tasks", "tiny_choice", *words])
        with pytest.raises(UserError, match="--cache_requests: lm-eval keeps requests as pickles"):
            command.main()


def test_bad_input_ends_with_its_status_and_a_sentence(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["lm-eval", "--model", NAME, "--use_cache", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == BAD_INPUT
    assert capsys.readouterr().err.startswith("error: --use_cache: lm-eval's cache knows a request but not the model")


BAD_ARGUMENTS = [
    ({}, "pretrained: missing; expected the base, a folder or a Hub id"),
    ({"peft": "nowhere"}, "nowhere: no adapter here"),
    ({"peft": "ADAPTER", "instance": 2}, "instance: lora-dropout has no such argument; did you mean instances?"),
    ({"peft": "ADAPTER", "zzz": 2}, "zzz: lora-dropout has no such argument; expected some of pretrained, "),
    ({"pretrained": "BASE", "load_in_4bit": True, "parallelize": True}, "load_in_4bit: write quantization=nf4\n"),
    ({"pretrained": "BASE", "parallelize": True}, "parallelize: the model is never split over devices"),
    ({"peft": "ADAPTER", "instances": 0}, "instances: found 0, expected a whole number of at least 1"),
    (
        {"pretrained": "BASE", "quantization": "nf5"},
        "quantization: found the text 'nf5', expected one of nf4, int8, none; did you mean nf4?",
    ),
    ({"peft": "ADAPTER", "instances": 2, "average": "mean"}, "average: found the text 'mean', expected one of logits"),
    ({"peft": "ADAPTER", "mode": "quick"}, "mode: found the text 'quick', expected one of auto, exact, fast"),
    ({"peft": "ADAPTER", "balanced": True}, "balanced: is about an ensemble; add its members, e.g. instances=8"),
    ({"pretrained": "BASE", "instances": 2}, "instances: an ensemble over masks needs an adapter; add peft=FOLDER"),
    ({"peft": "ADAPTER", "instances": 2, "rate": 0.3}, "was trained with rate 0.5, and its ensemble has that one"),
    ({"peft": "FOREIGN", "instances": 2}, "so there is no ensemble over masks; masks at test time only are worse"),
    ({"peft": "FOREIGN", "instances": 2, "rate": 1.0}, "rate: found 1.0, expected a number of at least 0 and below 1"),
    ({"peft": "ADAPTER", "pretrained": "/other"}, "base.model is called pretrained"),
    ({"peft": "ADAPTER", "quantization": "nf4"}, "trained on base.quantization=none"),
    (
        {"pretrained": "BASE", "dtype": "float32", "attention": "flash_attention_2"},
        "flash_attention_2",
    ),
]


@pytest.mark.parametrize(("given", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_told(
    given: dict[str, Any], message: str, adapter: Path, foreign: Path, recipe: Recipe
) -> None:
    known = {"ADAPTER": str(adapter), "FOREIGN": str(foreign), "BASE": recipe.base.model}
    with pytest.raises(UserError) as error:
        model_arguments({name: known.get(value, value) for name, value in given.items()})
    assert message in str(error.value)


def test_without_a_recipe_the_base_is_loaded_as_hf_does(foreign: Path, recipe: Recipe, adapter: Path) -> None:
    found = model_arguments({"peft": str(foreign)})
    stored = json.loads((Path(recipe.base.model) / "config.json").read_text())
    assert (found.base.model, found.base.quantization) == (recipe.base.model, "none")
    assert found.base.dtype == stored["dtype"]
    assert (found.name, found.mode) == ("deterministic", "exact")
    assert model_arguments({"peft": str(adapter)}).base == recipe.base


@pytest.mark.parametrize(("size", "expected"), [("7", 7), (3, 3), ("auto", "auto"), ("auto:4", "auto")])
def test_batch_sizes(size: str | int, expected: int | str) -> None:
    assert command._batch_size(size) == expected


@pytest.mark.parametrize("size", ["0", "-1", "many", "2.5"])
def test_batch_sizes_that_are_none_are_refused(size: str) -> None:
    with pytest.raises(UserError, match="--batch_size: found"):
        command._batch_size(size)


def test_devices(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (command._device("cpu").type, str(command._device("cuda:1"))) == ("cpu", "cuda:1")
    with pytest.raises(UserError, match="found 'cuda:2', expected one of cpu, cuda:0, cuda:1"):
        command._device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="each of the 4 processes has its own"):
        command._device("cuda:1")


def test_our_tasks_are_known_where_no_folder_is_named() -> None:
    ours = str(command.OUR_TASKS)
    assert with_our_tasks(["--tasks", "a"]) == ["--tasks", "a", "--include_path", ours]
    assert with_our_tasks(["ls", "tasks"])[-1] == ours
    for arguments in (["--include_path", "x"], ["--config", "c.yaml"], ["-h"], []):
        assert with_our_tasks(arguments) == arguments


def test_help_names_every_argument() -> None:
    lines = help_text().splitlines()
    assert [line.split()[0] for line in lines] == list(ARGUMENTS)
    assert all(len(line.split()) > 3 for line in lines)


def test_the_installed_command_is_this_one(repository: Path) -> None:
    scripts = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lora-dropout-lm-eval": f"{main.__module__}:{main.__name__}"}
    assert get_model(NAME) is LoraDropoutLM
