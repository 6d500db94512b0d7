"""What exports, their cards and the commands around them say of rates, kinds, folders and interruptions."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from launch.command import run_command
from launch.export import export as export_command
from launch.schema import schema as schema_command
from pipeline.adapter.files import read_settings, save_adapter, settings_of
from pipeline.errors import UserError
from pipeline.export.run import Form, Options, export
from pipeline.lora_dropout import LoraDropout, folded_alpha
from pipeline.recipe import Recipe, recipe_to_yaml, schema
from pipeline.run.model_card import write_model_card
from pipeline.train import masked_layers_in_words

PATTERN = {"q_proj": 0.5, r".*layers\.0\..*": 0.0}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def written(folder: Path, **section: Any) -> Path:
    """A run's folder with a random adapter of this section of a recipe, on q_proj and down_proj of two layers."""
    adapter = schema.Adapter(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"], **section)
    base = llama()
    base.save_pretrained(folder / "base")
    common = {"target_modules": adapter.target_modules, "task_type": "CAUSAL_LM", "lora_alpha": 8}
    if adapter.method == "adalora":
        config: LoraConfig = AdaLoraConfig(init_r=6, target_r=4, total_step=9, **common)
    else:
        own = {
            name: folded_alpha(8.0, rate, adapter.dropout.rescale)
            for name, rate in adapter.dropout.rate_pattern.items()
        }
        common["lora_alpha"] = folded_alpha(8.0, adapter.dropout.rate, adapter.dropout.rescale)
        config = LoraConfig(r=4, alpha_pattern={} if adapter.dropout.rescale else own, **common)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    run = folder / "run"
    run.mkdir()
    random = {name: torch.randn_like(weight) for name, weight in weights.items()}
    save_adapter(model, random, settings_of(adapter, 3), run)
    (run / "recipe.yaml").write_text(recipe_to_yaml(recipe(adapter, folder / "base")))
    return run


def recipe(adapter: schema.Adapter, base: Path = Path("base")) -> Recipe:
    return Recipe(
        name="tiny",
        base=schema.Base(model=str(base), quantization="none", dtype="float32"),
        adapter=adapter,
        data=schema.Data(train=[schema.Source(path="d.json")]),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("patterned"), dropout=schema.Dropout(rate=0.1, rate_pattern=PATTERN))


# --- rates and kinds -------------------------------------------------------------------------------------------------


def test_members_are_told_with_the_rates_of_all_layers(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "out", Options("ensemble", instances=1), progress=False)
    card = (folder / "README.md").read_text()
    assert r"masks at rate 0.1 (rate_pattern: `q_proj` 0.5, `.*layers\.0\..*` 0) in their weights" in card


def test_the_fold_of_each_rate_is_told(tmp_path: Path) -> None:
    run = written(tmp_path, dropout=schema.Dropout(rate=0.5, rate_pattern={"q_proj": 0.25}, rescale=False))
    folder = export(run, tmp_path / "out", Options(), progress=False)
    told = json.loads((folder / "manifest.json").read_text())["expectation"]
    assert told == (
        "alpha is 2 = 8 (1-p)^2: the mean of the masks is folded in; layers of rate_pattern have another p, and so "
        "their own alpha in alpha_pattern: 4.5 for `q_proj`"
    )
    assert told in (folder / "README.md").read_text()


def test_a_plain_export_of_adalora_says_that_it_stays_one(tmp_path: Path, run: Path) -> None:
    (tmp_path / "adalora").mkdir()
    adalora = written(tmp_path / "adalora", method="adalora", dropout=schema.Dropout(rate=0.5))
    folder = export(adalora, tmp_path / "out", Options(), progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["peft_type"] == "ADALORA" and manifest["note"].startswith("it stays AdaLoRA")
    assert f"A plain peft adapter ({manifest['note']}): `PeftModel" in (folder / "README.md").read_text()
    lora = json.loads((export(run, tmp_path / "lora", Options(), progress=False) / "manifest.json").read_text())
    assert lora["peft_type"] == "LORA" and "note" not in lora


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"dropout": schema.Dropout(rate=0.5)}, ("A LoRA adapter", "rank 4, alpha", "): rate 0.5, 1 instance(s) per")),
        (
            {"dropout": schema.Dropout(rate=0.5, rate_pattern={"q_proj": 0.2}, initial_rate=0.1)},
            ("): rate 0.5 (rate_pattern: `q_proj` 0.2), moved linearly from 0.1 at the first step, 1 instance(s) per",),
        ),
        ({"rank_stabilized": True}, ("A rank-stabilized LoRA (rsLoRA, ",)),
        ({"method": "adalora"}, ("An AdaLoRA adapter", "rank 4 on average over its layers, allocated from 6 in each")),
    ],
)
def test_the_model_card_tells_rates_and_kind(tmp_path: Path, section: dict[str, Any], words: tuple[str, ...]) -> None:
    record = {"data": [{"rows": 9, "split": "train"}], "engine": "one process", "processes": 1}
    write_model_card(recipe(schema.Adapter(rank=4, alpha=8.0, **section)), record, [], tmp_path)
    prose = (tmp_path / "README.md").read_text().split("## Recipe")[0]
    assert all(part in prose for part in words), prose


def test_training_tells_the_layers_that_are_masked() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert masked_layers_in_words(None) == "no LoRA Dropout"
    assert masked_layers_in_words(LoraDropout(model, 0.5, 1)) == "LoRA Dropout on 4 layers, rate 0.5"
    some = LoraDropout(model, 0.1, 1, rate_pattern={"layers.0.self_attn.q_proj": 0.5, "layers.0.mlp.down_proj": 0.0})
    assert masked_layers_in_words(some) == "LoRA Dropout on 3 of 4 layers, rates 0 to 0.5"
    grown = LoraDropout(model, 0.5, 1, initial_rate=0.1)
    assert masked_layers_in_words(grown) == "LoRA Dropout on 4 layers, rate 0.5, from 0.1 at the first step"


# --- refusals and ends -----------------------------------------------------------------------------------------------


def test_an_export_is_not_taken_for_a_run(run: Path, tmp_path: Path) -> None:
    members = export(run, tmp_path / "members", Options("ensemble", instances=1), progress=False)
    merged = tmp_path / "merged"
    merged.mkdir()
    manifest = json.loads((members / "manifest.json").read_text())
    (merged / "manifest.json").write_text(json.dumps({**manifest, "form": "merged"}))
    for folder, form, use in (
        (members, "ensemble", f"The members are plain adapters, for peft and for servers: {members / 'member-0'}, ..."),
        (merged, "merged", "The export is a whole model, which transformers loads by itself."),
    ):
        with pytest.raises(UserError) as error:
            read_settings(folder)
        assert str(error.value).splitlines() == [
            f"{folder}: this is an export ({form}) of tiny, not the adapter.",
            f"Give the run itself: {run.resolve()}. {use}",
        ]


@pytest.mark.parametrize("form", ["plain", "merged", "ensemble"])
def test_numbers_that_are_not_finite_are_not_exported(run: Path, tmp_path: Path, form: Form) -> None:
    spoilt = shutil.copytree(run, tmp_path / "spoilt")
    weights = {name: weight.clone() for name, weight in load_file(run / "adapter_model.safetensors").items()}
    name = min(weights)
    weights[name][0, 0] = float("nan")
    save_file(weights, spoilt / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"NaN or infinite values in {name} \(1 of \d+\)"):
        export(spoilt, tmp_path / "out", Options(form), progress=False)
    assert not (tmp_path / "out").exists()


def ended(command: Any, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of a command that is run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_folders_that_cannot_be_written_end_with_status_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "x")
    assert ended(export_command, str(run), "--output", below, monkeypatch=monkeypatch) == 2
    said = capfd.readouterr().err
    assert f"error: --output: {below} cannot be written: {tmp_path / 'file'}: Not a directory." in said
    assert "Choose a folder in which you may write, with another --output." in said
    assert ended(schema_command, "--output", below, monkeypatch=monkeypatch) == 2
    assert f"error: --output: {below} cannot be written: Not a directory." in capfd.readouterr().err


def test_an_interrupted_export_leaves_nothing_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt  # as Python's handler of Ctrl-C does; a parallel test run ignores the signal itself

    monkeypatch.setattr("pipeline.export.run.write_card", interrupted)
    assert ended(export_command, str(run), "--output", str(tmp_path / "out"), monkeypatch=monkeypatch) == 130
    assert capfd.readouterr().err.strip() == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []
