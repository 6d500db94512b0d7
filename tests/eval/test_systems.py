"""All systems in one run, what is recorded of them, and adapters that make no deep ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError

from eval.adapters import check_deep_ensemble, weights_hash
from eval.run import evaluate
from eval.systems import SYSTEMS, description, mode_of, systems_of
from pipeline.adapter.files import AdapterSettings, save_adapter
from pipeline.base import load_base
from pipeline.errors import UserError
from pipeline.recipe import recipe_to_yaml
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, McDropout, Recipe, Source

MASKED = AdapterSettings(rate=0.5, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)
UNMASKED = AdapterSettings(rate=0.0, instances=1, sampling="example", rescale=True, alpha=8.0, seed=7)


def saved(pocket_base: Path, folder: Path, seed: int, config: LoraConfig) -> Path:
    """A random adapter, as training would leave it."""
    torch.manual_seed(seed)
    base = load_base(Base(model=str(pocket_base), quantization="none", dtype="float32"))
    model = get_peft_model(base, config)
    folder.mkdir()
    weights = {name: 0.05 * torch.randn_like(value) for name, value in get_peft_model_state_dict(model).items()}
    save_adapter(model, weights, MASKED, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(pocket_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three, trained with peft's dropout 0.2 (so their configuration says)."""
    folder = tmp_path_factory.mktemp("seeds")
    return [
        saved(
            pocket_base,
            folder / f"seed-{seed}",
            seed,
            LoraConfig(
                r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
            ),
        )
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def recipe(pocket_base: Path, task_folder: Path, adapters: list[Path]) -> Recipe:
    return Recipe(
        name="five",
        base=Base(model=str(pocket_base), quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path="unused.json")]),
        eval=Eval(
            tasks=["tiny_choice", "tiny_words"],
            task_folders=[str(task_folder)],
            systems=list(SYSTEMS),
            ensemble=Ensemble(instances=2, average="probabilities"),
            mc_dropout=McDropout(instances=2, seed=5),
            deep_ensemble=[str(folder) for folder in adapters[1:]],
            batch_size=4,
            limit=3,
        ),
    )


def with_eval(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=changes)})


def records(folder: Path) -> dict[str, Any]:
    """What every sample of every system keeps of its requests, by file."""
    return {
        file.name: [json.loads(line)["lora_dropout"]["requests"] for line in file.open()]
        for file in sorted(folder.glob("samples_*.jsonl"))
    }


def test_all_five_systems_in_one_run(recipe: Recipe, adapters: list[Path], tmp_path: Path) -> None:
    """Each answers in its own way, says what its members are, and its kept answers are found again."""
    folder = evaluate(recipe, adapters[0], tmp_path, progress=False)
    assert folder is not None
    ours = json.loads((folder / "results.json").read_text())["lora_dropout"]
    assert list(ours["systems"]) == list(SYSTEMS) and ours["warnings"] == []
    assert {system["mode"] for system in ours["systems"].values()} == {"fast"}
    members = {name: system["members"] for name, system in ours["systems"].items()}
    assert members["base"] is None and members["deterministic"] is None
    assert members["ensemble"]["kind"] == "masks" and members["ensemble"]["rate"] == 0.5
    assert members["mc_dropout"].items() >= {"rate": 0.2, "seed": 5, "instances": 2, "average": "probabilities"}.items()
    assert members["deep_ensemble"] == {
        "kind": "adapters",
        "instances": 3,
        "average": "probabilities",
        "further": [weights_hash(further) for further in adapters[1:]],
        "folders": [str(further) for further in adapters[1:]],
    }
    report = (folder / "report.md").read_text()
    assert "2 members, average of probabilities at every token; rate 0.2 on the adapter's input, noise seed 5" in report
    assert f"3 adapters, average of probabilities at every token; with {adapters[1]}, {adapters[2]}" in report
    found = records(folder)
    sizes = {"base": 1, "deterministic": 1, "mc_dropout": 2, "deep_ensemble": 3, "ensemble": 2}
    assert {name: len(found[f"samples_{name}_tiny_choice.jsonl"][0][0]["running"]) for name in sizes} == sizes
    assert len({json.dumps(found[f"samples_{name}_tiny_choice.jsonl"]) for name in sizes}) == 5
    first = {name: found[f"samples_{name}_tiny_choice.jsonl"][0][0] for name in sizes}
    assert first["deep_ensemble"]["members"][0] == pytest.approx(first["deterministic"]["members"][0], abs=1e-4), (
        "the first member of the deep ensemble is the adapter itself"
    )

    systems = ["mc_dropout", "deep_ensemble"]
    again = evaluate(with_eval(recipe, systems=systems), adapters[0], tmp_path, progress=False)
    assert again is not None
    kept = json.loads((again / "results.json").read_text())["lora_dropout"]["systems"]
    assert all(kept[name]["kept"] == kept[name]["requests"] for name in systems)
    wanted = {name: found[name] for name in found if any(system in name for system in systems)}
    assert records(again) == wanted


def test_adapters_that_make_no_deep_ensemble(
    recipe: Recipe, adapters: list[Path], pocket_base: Path, tmp_path: Path
) -> None:
    def refused(*further: Path) -> str:
        with pytest.raises(UserError) as error:
            check_deep_ensemble(with_eval(recipe, deep_ensemble=[str(folder) for folder in further]), adapters[0])
        return str(error.value)

    check_deep_ensemble(recipe, adapters[0])
    check_deep_ensemble(recipe, None)
    check_deep_ensemble(with_eval(recipe, systems=["base"], deep_ensemble=[]), None)
    assert "found no folder, and a deep ensemble averages at least two adapters" in refused()
    copied = shutil.copytree(adapters[1], tmp_path / "copied")
    assert refused(adapters[1], copied).startswith(f"eval.deep_ensemble: {copied} has the weights of {adapters[1]}")
    assert refused(adapters[0]).startswith(f"eval.deep_ensemble: {adapters[0]} has the weights of {adapters[0]}")
    nowhere = tmp_path / "nowhere"
    assert f"eval.deep_ensemble: {nowhere}: no adapter here (found: no such folder)" in refused(adapters[1], nowhere)

    moved = shutil.copytree(adapters[1], tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/llama"}))
    assert "trained on the base 'other/llama'" in refused(moved)
    stored = shutil.copytree(adapters[1], tmp_path / "stored")
    trained = recipe.model_copy(update={"base": Base(model=str(pocket_base), quantization="nf4")})
    (stored / "recipe.yaml").write_text(recipe_to_yaml(trained))
    assert "trained on base.quantization=nf4 base.dtype=bfloat16, but this recipe has" in refused(stored)

    other = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    svd = saved(pocket_base, tmp_path / "svd", 0, other)
    assert refused(svd).startswith(f"eval.deep_ensemble: {svd} is ADALORA, and {adapters[0]} is LORA")


def test_a_recipe_with_a_deep_ensemble_names_its_adapters() -> None:
    with pytest.raises(ValidationError, match="found no folder, and the system deep_ensemble averages at least two"):
        Eval(systems=["deep_ensemble"])


def test_noise_needs_a_rate(recipe: Recipe, adapters: list[Path], tmp_path: Path) -> None:
    assert systems_of(recipe, MASKED, adapters[0]) == (list(SYSTEMS), [])
    plain = shutil.copytree(adapters[0], tmp_path / "plain")
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.0}))
    both = with_eval(recipe, systems=["deterministic", "mc_dropout"])
    systems, (warning,) = systems_of(both, MASKED, plain)
    assert systems == ["deterministic"]
    assert "plain was trained without dropout on the adapter's input and eval.mc_dropout.rate gives none" in warning
    assert warning.endswith("Evaluating the rest.")
    rated = with_eval(both, mc_dropout=McDropout(rate=0.1))
    systems, (warning,) = systems_of(rated, MASKED, plain)
    assert systems == ["deterministic", "mc_dropout"]
    assert "its Monte Carlo dropout has this recipe's rate 0.1, and noise that training did not know" in warning
    unmasked = with_eval(recipe, systems=["mc_dropout", "ensemble"])
    unmasked = unmasked.model_copy(update={"adapter": Adapter(dropout=Dropout(rate=0.0))})
    with pytest.raises(UserError, match=r"no Monte Carlo dropout; .* no ensemble over masks; evaluate it with"):
        systems_of(unmasked, UNMASKED, plain)


def test_every_system_has_words_and_averages_make_the_mode_fast(recipe: Recipe) -> None:
    words = {name: description(name, recipe.eval) for name in SYSTEMS}
    assert words["mc_dropout"] == (
        "Monte Carlo dropout, 2 members with noise on the adapter's input, average of probabilities"
    )
    assert words["deep_ensemble"] == "the deep ensemble of 3 adapters, masks off, average of probabilities"
    assert len(set(words.values())) == 5
    assert mode_of(recipe.eval, ["base", "deterministic"]) == "exact"
    assert mode_of(recipe.eval, ["deterministic", "mc_dropout"]) == "fast" == mode_of(recipe.eval, ["deep_ensemble"])
