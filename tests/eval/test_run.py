"""The evaluation stage: systems, scores, the folder it leaves, and what bad input answers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.metrics import mean_stderr
from peft import get_peft_model_state_dict
from report_results import synthetic_results

from eval import run
from eval.adapters import check_base
from eval.results import SystemScores, write_folder
from eval.run import evaluate, memory_advice, systems_of
from pipeline.adapter.files import AdapterSettings, read_settings, save_adapter
from pipeline.errors import UserError
from pipeline.recipe import recipe_to_yaml
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, Recipe, Source


def settings(rate: float = 0.5) -> AdapterSettings:
    return AdapterSettings(rate=rate, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)


@pytest.fixture(scope="session")
def adapter_folder(adapted: Any, pocket_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random adapter as training would leave it, with a log."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted.model.peft_config["default"].base_model_name_or_path = str(pocket_base)
    save_adapter(adapted.model, get_peft_model_state_dict(adapted.model), settings(), folder)
    (folder / "history.jsonl").write_text(json.dumps({"step": 1, "epoch": 0.5, "loss": 2.5, "time": 0.0}) + "\n")
    (folder / "provenance.json").write_text(json.dumps({"seed": 7}))
    return folder


@pytest.fixture
def recipe(pocket_base: Path, task_folder: Path) -> Recipe:
    return Recipe(
        name="tiny",
        base=Base(model=str(pocket_base), quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path="unused.json")]),
        eval=Eval(
            tasks=["tiny_choice", "tiny_words", "tiny_text"],
            task_folders=[str(task_folder)],
            ensemble=Ensemble(instances=3),
            batch_size=4,
        ),
    )


def plain(text: str) -> str:
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


def with_eval(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=changes)})


def test_one_evaluation_leaves_everything(recipe: Recipe, adapter_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = evaluate(recipe, adapter_folder, tmp_path)
    assert folder is not None and folder.parent == tmp_path / "tiny"
    assert (tmp_path / "tiny" / "latest").resolve() == folder.resolve()
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {folder.name, "latest", "answers"}, "no partial one"
    assert {"report.md", "report.html"} <= {file.name for file in folder.iterdir()}
    said = plain(capsys.readouterr().out)
    assert "Evaluating the base without adapter (1 of 3)" in said
    assert "the ensemble of 3 masked adapters, average of logits (3 of 3)" in said

    results = json.loads((folder / "results.json").read_text())
    ours = results["lora_dropout"]
    assert list(ours["systems"]) == ["base", "deterministic", "ensemble"]
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"} <= results.keys()
    assert results["results"] == ours["systems"]["ensemble"]["results"], "lm-eval's part is the last system's"
    assert ours["ensemble"] == {
        "instances": 3,
        "average": "logits",
        "balanced": False,
        "rate": 0.5,
        "rate_pattern": {},
        "seed": 7,
    }
    assert ours["warnings"] == []
    assert ours["history"][0]["loss"] == 2.5 and ours["provenance"]["training"] == {"seed": 7}
    assert ours["adapter_settings"]["r"] == 4 and ours["adapter_settings"]["lora_alpha"] == 8.0
    assert ours["provenance"]["evaluation"]["versions"]["lm-eval"]
    scores_shown = [
        rf"{100 * system['results']['tiny_choice']['acc,none']:.1f} ± [\d.]+" for system in ours["systems"].values()
    ]
    assert re.search(rf"tiny_choice accuracy, % ↑ 11 {' '.join(scores_shown)} tiny_choice", said), "on the screen"
    assert said.index("tiny_choice accuracy") < said.index("results and report written to")
    assert all(system["seconds"] > 0 for system in ours["systems"].values())
    assert {system["requests"] for system in ours["systems"].values()} == {3 * 11 + 11 + 11}

    texts = []
    for system, scores in ours["systems"].items():
        samples = [json.loads(line) for line in (folder / f"samples_{system}_tiny_choice.jsonl").open()]
        assert [sample["doc_id"] for sample in samples] == list(range(11))
        correct = [sample["acc"] for sample in samples]
        assert scores["results"]["tiny_choice"]["acc,none"] == sum(correct) / 11
        assert scores["results"]["tiny_choice"]["acc_stderr,none"] == pytest.approx(mean_stderr(correct))
        assert scores["results"]["tiny_text"]["bits_per_byte_stderr,none"] == "N/A", "not a mean over documents"
        texts.append((folder / f"samples_{system}_tiny_words.jsonl").read_text())
    assert len(set(texts)) == 3, "three systems, three answers"


def test_results_are_never_overwritten(recipe: Recipe, adapter_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "now", lambda: "2030-01-02T03:04:05+00:00")
    quick = with_eval(recipe, tasks=["tiny_choice"], limit=2, systems=["deterministic"])
    folders = [evaluate(quick, adapter_folder, tmp_path, progress=False) for _ in range(2)]
    assert [folder.name for folder in folders if folder] == ["20300102-030405", "20300102-030405-2"]
    assert (tmp_path / "tiny" / "latest").resolve().name == "20300102-030405-2"


def test_groups_get_standard_errors_too(
    recipe: Recipe, adapter_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    tasks = shutil.copytree(task_folder, tmp_path / "tasks")
    twin = (tasks / "tiny_choice.yaml").read_text().replace("task: tiny_choice", "task: tiny_twin")
    (tasks / "tiny_twin.yaml").write_text(twin)
    (tasks / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice, tiny_twin]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    grouped = with_eval(recipe, tasks=["tiny_group"], task_folders=[str(tasks)], systems=["deterministic"])
    folder = evaluate(grouped, adapter_folder, tmp_path / "out", progress=False)
    assert folder is not None
    results = json.loads((folder / "results.json").read_text())
    for scores in (results["groups"], results["results"]):
        assert scores["tiny_group"]["acc,none"] == results["results"]["tiny_choice"]["acc,none"]
        assert scores["tiny_group"]["acc_stderr,none"] == pytest.approx(
            results["results"]["tiny_choice"]["acc_stderr,none"] / math.sqrt(2)
        )


def test_the_training_prompt_reaches_the_tasks(recipe: Recipe, adapter_folder: Path, tmp_path: Path) -> None:
    quick = with_eval(
        recipe, tasks=["tiny_choice", "tiny_words"], limit=2, systems=["deterministic"], prompt="training"
    )
    folder = evaluate(quick, adapter_folder, tmp_path, progress=False)
    assert folder is not None
    for task in ("tiny_choice", "tiny_words"):
        for line in (folder / f"samples_deterministic_{task}.jsonl").open():
            prompt = json.loads(line)["arguments"][0][0]
            assert prompt.startswith("Below is an instruction") and prompt.endswith("### Response:\n")


def test_without_lora_dropout_and_without_a_rate_there_is_no_ensemble(recipe: Recipe) -> None:
    folder = Path("outputs/plain")
    plain_lora = recipe.model_copy(update={"adapter": Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.0))})
    systems, (warning,) = systems_of(plain_lora, settings(rate=0.0), folder)
    assert systems == ["base", "deterministic"]
    assert "outputs/plain was trained without LoRA Dropout (rate 0) and this recipe has no rate" in warning
    assert "worse than none" in warning
    with pytest.raises(UserError, match="no ensemble over masks; evaluate it with"):
        systems_of(with_eval(plain_lora, systems=["ensemble"]), settings(rate=0.0), folder)
    with pytest.raises(UserError, match="systems: empty"):
        systems_of(with_eval(recipe, systems=[]), settings(), folder)
    assert systems_of(recipe, settings(), folder) == (["base", "deterministic", "ensemble"], [])


def test_masks_at_test_time_only_are_warned_of(
    recipe: Recipe, adapter_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """The (balanced) ensemble of an adapter that was trained without LoRA Dropout: on the screen and in every file."""
    systems, warnings = systems_of(recipe, settings(rate=0.0), Path("outputs/plain"))
    assert systems == ["base", "deterministic", "ensemble"]
    recipes_rate = "its ensemble is drawn with this recipe's rate 0.5, and masks at test time only are worse than none."
    assert warnings == [f"outputs/plain was trained without LoRA Dropout (rate 0); {recipes_rate}"]

    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    for name in ("lora_dropout.json", "history.jsonl", "provenance.json"):
        (folder / name).unlink()  # as stock peft leaves an adapter
    ensemble = Ensemble(instances=2, balanced=True)
    quick = with_eval(recipe, tasks=["tiny_choice"], limit=1, systems=["ensemble"], ensemble=ensemble)
    written = evaluate(quick, folder, tmp_path / "out")
    assert written is not None
    warning = f"{folder} comes without lora_dropout.json, the record of a training with LoRA Dropout; {recipes_rate}"
    said = plain(capsys.readouterr().out)
    assert f"warning: {warning}" in said and "Evaluating the ensemble of 2 balanced masked adapters" in said
    ours = json.loads((written / "results.json").read_text())["lora_dropout"]
    assert ours["warnings"] == [warning]
    assert ours["ensemble"] == {
        "instances": 2,
        "average": "logits",
        "balanced": True,
        "rate": 0.5,
        "rate_pattern": {},
        "seed": 42,
    }
    report = (written / "report.md").read_text()
    assert f"> {warning}" in report and "2 balanced members, average of logits at every token" in report
    assert "not recorded: an adapter of another origin" in report


def test_results_that_could_not_be_written_are_refused_first(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--output: .*file.* cannot be written"):
        evaluate(recipe, tmp_path / "nothing", tmp_path / "file")


def test_a_missing_adapter_is_named_before_anything_is_loaded(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter here .found: no such folder.*\n.*train first with launch/sft.py"):
        evaluate(recipe, tmp_path / "nothing", tmp_path)


def test_damaged_and_disagreeing_adapters_are_refused_before_the_base_loads(
    recipe: Recipe, adapter_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "load_base", None)
    other = recipe.model_copy(update={"adapter": Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.3))})
    with pytest.raises(UserError, match=r"adapter\.dropout\.rate: trained with 0\.5, the recipe has 0\.3"):
        evaluate(other, adapter_folder, tmp_path)
    folder = shutil.copytree(adapter_folder, tmp_path / "damaged")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: truncated"):
        evaluate(recipe, folder, tmp_path)


def test_an_adapter_of_another_base_is_refused(recipe: Recipe, adapter_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter_folder, tmp_path / "other")
    file = other / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}))
    with pytest.raises(UserError, match=r"trained on the base 'meta-llama/Llama-2-7b-hf', but base.model is"):
        evaluate(recipe, other, tmp_path)
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere/base"}))
    check_base(recipe.base, other)  # moved, same name


@pytest.mark.parametrize(
    ("trained", "evaluated", "was", "found"),
    [
        ({"quantization": "none"}, {"quantization": "nf4"}, "base.quantization=none", "base.quantization=nf4"),
        (
            {"double_quantization": False},
            {"double_quantization": True},
            "base.double_quantization=false",
            "base.double_quantization=true",
        ),
        (
            {"double_quantization": False, "dtype": "float32"},
            {"quantization": "int8"},
            "base.quantization=nf4 base.dtype=float32 base.double_quantization=false",
            "base.quantization=int8 base.dtype=bfloat16 base.double_quantization=true",
        ),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "base.dtype=bfloat16", "base.dtype=float32"),
    ],
)
def test_another_storage_of_the_base_is_refused(
    recipe: Recipe, adapter_folder: Path, tmp_path: Path, trained: dict, evaluated: dict, was: str, found: str
) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    trained_base, other = (Base(model=recipe.base.model, **changes) for changes in (trained, evaluated))
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe.model_copy(update={"base": trained_base})))
    with pytest.raises(UserError) as error:
        check_base(other, folder)
    assert f"{folder}: trained on {was}, but this recipe has {found}:" in str(error.value)
    assert str(error.value).endswith(f"Evaluate with {was}")
    check_base(trained_base, folder)
    (folder / "recipe.yaml").unlink()
    check_base(other, folder)  # how it was trained is not known


def test_double_quantization_counts_for_nf4_only(recipe: Recipe, adapter_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    base = recipe.base.model_copy(update={"double_quantization": False})
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe.model_copy(update={"base": base})))
    check_base(recipe.base, folder)


class NoText:
    """An object that does not tell what it is."""

    def __str__(self) -> str:
        raise ValueError("no text for this")


@pytest.mark.parametrize("broken", ["samples", "results", "report"])
def test_a_results_folder_appears_whole_or_not_at_all(tmp_path: Path, broken: str) -> None:
    results = synthetic_results()
    scores = SystemScores(results["results"], {"task": [{"doc_id": 0}]}, 1, 1.0, None, "fast", 0, {})
    first = write_folder(results, {"ensemble": scores}, tmp_path, "2030-01-02T03:04:05+00:00")
    assert {file.name for file in first.iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "plots",
        "samples_ensemble_task.jsonl",
    }
    if broken == "samples":
        scores.samples["task"][0]["target"] = NoText()
    elif broken == "results":
        results["config"] = NoText()
    else:
        results["lora_dropout"]["recipe"] = {"name": "of another version"}
    with pytest.raises((ValueError, UserError), match=r"no text for this|this version reads other recipes"):
        write_folder(results, {"ensemble": scores}, tmp_path, "2030-01-02T03:04:06+00:00")
    assert {file.name for file in tmp_path.iterdir()} == {first.name, "latest"}, "nothing is left of the second"
    assert (tmp_path / "latest").resolve() == first.resolve()


def test_an_untrained_adapter_is_refused(recipe: Recipe, adapted: Any, adapter_folder: Path, tmp_path: Path) -> None:
    zero = shutil.copytree(adapter_folder, tmp_path / "zero")
    weights = {
        name: torch.zeros_like(weight) if "lora_B" in name else weight
        for name, weight in get_peft_model_state_dict(adapted.model).items()
    }
    save_adapter(adapted.model, weights, read_settings(zero), zero)
    with pytest.raises(UserError, match="the adapter does not change the model"):
        evaluate(recipe, zero, tmp_path)


def test_out_of_memory_says_what_to_change_in_order(recipe: Recipe) -> None:
    with pytest.raises(UserError) as error, memory_advice(recipe.eval):
        raise torch.OutOfMemoryError("CUDA out of memory")
    lines = str(error.value).splitlines()
    assert "eval.batch_size=2" in lines[1]
    assert "eval.ensemble.rows_per_pass=6" in lines[2]
    assert [line.strip()[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    single = with_eval(recipe, batch_size=1, systems=["deterministic"]).eval
    with pytest.raises(UserError) as error, memory_advice(single):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "eval.batch_size" not in str(error.value) and "ensemble" not in str(error.value)
