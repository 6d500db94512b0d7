"""Comparison of two evaluations that really ran: pocket base, random adapter, tiny tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model_state_dict

from eval.compare.run import Declared, compare_adapters
from eval.compare.schema import Comparison
from eval.run import evaluate
from pipeline.adapter.files import AdapterSettings, save_adapter
from pipeline.errors import UserError
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, Recipe, Source


@pytest.fixture(scope="module")
def run(adapted: Any, pocket_base: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three systems on a choice task, a generation task and a rolling task."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = AdapterSettings(rate=0.5, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)
    adapted.model.peft_config["default"].base_model_name_or_path = str(pocket_base)
    save_adapter(adapted.model, get_peft_model_state_dict(adapted.model), settings, folder / "adapter")
    recipe = Recipe(
        name="tiny",
        base=Base(model=str(pocket_base), quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path="unused.json")]),
        eval=Eval(
            tasks=["tiny_choice", "tiny_words", "tiny_text"],
            task_folders=[str(task_folder)],
            ensemble=Ensemble(instances=2),
        ),
    )
    found = evaluate(recipe, folder / "adapter", folder, progress=False)
    limited = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"limit": 4, "systems": ["base"]})})
    evaluate(limited.model_copy(update={"name": "limited"}), folder / "adapter", folder, progress=False)
    assert found is not None
    return found


def test_systems_of_a_real_run(run: Path, tmp_path: Path) -> None:
    out = compare_adapters([f"{run}:base", str(run)], Declared(discordance=0.2), tmp_path / "out")
    comparison = Comparison.model_validate_json((out / "comparison.json").read_text())
    assert [one.label for one in comparison.runs] == ["tiny:base", "tiny:ensemble"]
    assert [one.system_taken for one in comparison.runs] == ["named", "the last that ran"]
    systems = json.loads((run / "results.json").read_text())["lora_dropout"]["systems"]
    tasks = {task.task: task for task in comparison.tasks}
    assert tasks.keys() == {"tiny_choice", "tiny_words", "tiny_text"}
    for name, task in tasks.items():
        analyses = [systems[system]["analysis"][name] for system in ("base", "ensemble")]
        assert {analyses[0]["primary"]} == {analyses[1]["primary"]} == {task.differences[0].metric}
        for found in task.differences:
            values = [analysis["metrics"][found.metric]["value"] for analysis in analyses]
            assert [found.first, found.second] == pytest.approx(values, rel=1e-12, abs=1e-12)
    assert {"acc", "nll", "brier", "overconfidence"} <= {found.metric for found in tasks["tiny_choice"].differences}
    assert tasks["tiny_text"].differences[0].metric == "bits_per_byte" and tasks["tiny_text"].flips is None
    assert len(tasks["tiny_choice"].differences[0].test) > 0 and comparison.family is not None
    assert comparison.family.tests == 3


def test_a_limited_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        compare_adapters([f"{run}:base", str(run.parent.parent / "limited")], Declared(), tmp_path / "never")
    said = " ".join(str(error.value).split())
    assert "eval.limit: none in tiny:base, 4 in limited:base" in said
    assert "tiny_choice, 11 documents in tiny:base, 4 in limited:base: 7 documents are in tiny:base only" in said
    assert "the first are documents 4, 5, 6" in said
