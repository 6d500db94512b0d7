"""Exports: every form against the adapter it came from, on several architectures; and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from pipeline.adapter.check import check_adapter
from pipeline.adapter.files import AdapterSettings, adapter_dropout, load_adapter, save_adapter
from pipeline.base import load_base
from pipeline.errors import UserError
from pipeline.export import run as export_module
from pipeline.export.merge import merged_model
from pipeline.export.run import Options, default_folder, export, sha256
from pipeline.recipe import load_recipe, recipe_to_yaml, schema

VOCABULARY = 67


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> PreTrainedModel:
    """Conv1D layers, and an embedding that is the output head, too."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def mixtral() -> PreTrainedModel:
    """Experts in fused parameters."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def settings(**changes: Any) -> AdapterSettings:
    known = {"rate": 0.5, "instances": 1, "sampling": "example", "rescale": True, "alpha": 8.0, "seed": 7}
    return AdapterSettings(**{**known, **changes})


def write_adapter(
    folder: Path, base: PreTrainedModel, config: LoraConfig, recorded: AdapterSettings | None = None
) -> Path:
    """A saved ``base`` in the folder, and the ``adapter`` that is returned, random, which changes it."""
    torch.manual_seed(0)
    base.save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), copy.copy(config)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    (folder / "adapter").mkdir()
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_adapter(model, {name: w.clone() for name, w in weights.items()}, recorded or settings(), folder / "adapter")
    return folder / "adapter"


def stock_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(torch.randint(VOCABULARY, (2, 9))).logits


KINDS: dict[str, tuple[Callable[[], PreTrainedModel], LoraConfig]] = {
    "grouped queries": (llama, lora()),
    "rank-stabilised, one pattern": (llama, lora(use_rslora=True, alpha_pattern={"q_proj": 3})),
    "Conv1D": (gpt2, lora(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)),
    "embedding": (gpt2, lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    "experts": (
        mixtral,
        lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "adalora": (
        llama,
        AdaLoraConfig(
            init_r=6,
            target_r=3,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            total_step=9,
            task_type="CAUSAL_LM",
        ),
    ),
}


@pytest.mark.parametrize("balanced", [False, True], ids=["independent", "balanced"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_member_is_the_in_process_member(tmp_path: Path, kind: str, balanced: bool) -> None:
    build, config = KINDS[kind]
    recorded = settings(rate=0.4, method="adalora" if kind == "adalora" else "lora", rate_pattern={"0.*": 0.6})
    adapter = write_adapter(tmp_path, build(), config, recorded)
    folder = export(adapter, tmp_path / "out", Options("ensemble", instances=3, balanced=balanced), progress=False)
    ours = load_adapter(stock_base(tmp_path), adapter)
    dropout = adapter_dropout(ours, recorded)
    found = []
    for number in range(3):
        member = PeftModel.from_pretrained(stock_base(tmp_path), str(folder / f"member-{number}"))
        with dropout.members([number], balanced=3 if balanced else None):
            expected = logits(ours)
        torch.testing.assert_close(logits(member), expected, atol=1e-5, rtol=1e-5)
        found.append(expected)
    assert not torch.allclose(found[0], found[1], atol=1e-2), "members differ"
    config_file = json.loads((folder / "member-0" / "adapter_config.json").read_text())
    assert config_file["peft_type"] == "LORA" and config_file["inference_mode"]


@pytest.mark.parametrize("cut", [False, True], ids=["zeros", "rank_pattern"])
def test_adalora_members_have_one_rank(tmp_path: Path, cut: bool) -> None:
    """The allocation leaves layers different ranks, even none, cut or as zeros; a member fills up with zeros."""
    recorded = settings(method="adalora")
    adapter = write_adapter(tmp_path, llama(), KINDS["adalora"][1], recorded)
    model = load_adapter(stock_base(tmp_path), adapter)
    pattern = {}
    for taken, (name, parameter) in zip((1, 2, 4, 6), find_parameters(model, "lora_E"), strict=True):
        parameter.data[:taken] = 0  # 5, 4, 2 and 0 are left
        pattern[name.removeprefix("base_model.model.")] = (parameter[:, 0] != 0).tolist()
    model.peft_config["default"].rank_pattern = pattern if cut else None
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    ranks = {weight.shape[0] for name, weight in weights.items() if "lora_E" in name}
    assert ranks == ({5, 4, 2, 0} if cut else {6})
    save_adapter(model, {name: weight.clone() for name, weight in weights.items()}, recorded, adapter)
    folder = export(adapter, tmp_path / "out", Options("ensemble", instances=1), progress=False)
    config = json.loads((folder / "member-0" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5 and not config["rank_pattern"]
    shapes = {tuple(w.shape) for w in load_file(folder / "member-0" / "adapter_model.safetensors").values()}
    assert {min(shape) for shape in shapes} == {5}
    ours = load_adapter(stock_base(tmp_path), adapter)
    with adapter_dropout(ours, recorded).members([0]):
        expected = logits(ours)
    member = PeftModel.from_pretrained(stock_base(tmp_path), str(folder / "member-0"))
    torch.testing.assert_close(logits(member), expected, atol=1e-5, rtol=1e-5)


def find_parameters(model: PeftModel, kind: str) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if kind in name]


@pytest.fixture
def trained(tmp_path: Path, pocket_base: Path) -> Path:
    """A tiny LLaMA with a tokenizer, and an adapter of rank 4 as training leaves it, equation 2 verbatim."""
    adapter = write_adapter(tmp_path, llama(), lora(lora_alpha=2.0), settings(rescale=False))
    AutoTokenizer.from_pretrained(pocket_base).save_pretrained(tmp_path / "base")
    recipe = schema.Recipe(
        name="tiny",
        base=schema.Base(model=str(tmp_path / "base"), quantization="nf4", dtype="bfloat16"),
        adapter=schema.Adapter(rank=4, alpha=8.0, dropout=schema.Dropout(rescale=False)),
        data=schema.Data(train=[schema.Source(path="d.json")]),
        eval=schema.Eval(ensemble=schema.Ensemble(instances=2, average="probabilities", balanced=True)),
    )
    (adapter / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    record = {"data": [{"rows": 9, "split": "train"}], "engine": "one process", "processes": 1}
    (adapter / "provenance.json").write_text(json.dumps(record))
    return adapter


def test_plain(trained: Path) -> None:
    folder = export(trained, default_folder(trained, "plain"), Options(), progress=False)
    assert folder == trained.parent / "adapter-plain"
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(stock_base(trained.parent), str(folder))),
        logits(load_adapter(stock_base(trained.parent), trained)),
        atol=0,
        rtol=0,
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["expectation"] == "alpha is 2 = 8 (1-p)^2: the mean of the masks is folded in"
    assert manifest["source"]["sha256"]["adapter_model.safetensors"] == sha256(trained / "adapter_model.safetensors")
    assert manifest["base"] == {
        "model": str(trained.parent / "base"),
        "revision": "main",
        "quantization": "nf4",
        "dtype": "bfloat16",
    }
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and "# tiny" in card and "9 train rows" in card
    assert manifest["expectation"] in card


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_merged(trained: Path, dtype: str, tolerance: float) -> None:
    """Equal to the adapter on the 16-bit base; in bfloat16 up to the rounding of weights and activations (2**-8)."""
    options = Options("merged", dtype=dtype, max_shard_size="20KB")
    folder = export(trained, trained.parent / "merged", options, progress=False)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert str(merged.dtype) == f"torch.{dtype}"
    base = AutoModelForCausalLM.from_pretrained(trained.parent / "base", dtype=merged.dtype).eval()
    expected = logits(load_adapter(base, trained)).float()
    assert (logits(merged).float() - expected).abs().max() < tolerance * expected.abs().max()
    with torch.no_grad():
        plain = logits(stock_base(trained.parent))
    assert (plain - expected).abs().max() > 2 * tolerance * expected.abs().max(), "the adapter does something"
    files = {file.name for file in folder.iterdir()}
    assert {"model.safetensors.index.json", "generation_config.json", "tokenizer.json", "README.md"} <= files
    assert len([name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]) > 2
    assert not any(name.startswith("adapter") for name in files)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["trained_on"] == "nf4" and manifest["dtype"] == dtype
    assert f"rounded to nf4, and now on its {dtype} weights" in manifest["note"]
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_the_manifest_of_an_ensemble(trained: Path) -> None:
    folder = export(trained, trained.parent / "out", Options("ensemble"), progress=False)
    whole = json.loads((folder / "manifest.json").read_text())
    alone = json.loads((folder / "member-1" / "manifest.json").read_text())
    assert whole["members"] == {"0": "member-0", "1": "member-1"}
    assert alone["member"] == 1
    for manifest in (whole, alone):
        found = {key: manifest[key] for key in ("rate", "mask_seed", "instances", "balanced", "average")}
        assert found == {
            "rate": 0.5,
            "mask_seed": 7,
            "instances": 2,
            "balanced": True,
            "average": "probabilities",
        }
        assert "mean of the members' probabilities" in manifest["average_rule"]
        assert set(manifest["source"]["sha256"]) >= {"adapter_model.safetensors", "adapter_config.json"}
        assert manifest["versions"]["peft"] and manifest["settings"]["rescale"] is False
    card = (folder / "README.md").read_text()
    assert "`member-0` to `member-1`" in card and "balanced: an ensemble of all of them" in card


def test_a_stock_adapter_is_exported_too(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama(), lora())
    (adapter / "lora_dropout.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    folder = export(adapter, tmp_path / "plain", Options(), progress=False)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "README.md",
    }
    with pytest.raises(UserError, match=r"comes without lora_dropout\.json.*so it has no masks and no members"):
        export(adapter, tmp_path / "out", Options("ensemble"), progress=False)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"does not name the base model: give it with --base MODEL"):
        export(adapter, tmp_path / "out", Options(), progress=False)
    export(adapter, tmp_path / "given", Options(base=str(tmp_path / "base")), progress=False)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options("plain", instances=4), "--instances: belongs to --form ensemble, found --form plain"),
        (Options("merged", balanced=True), "--balanced: belongs to --form ensemble"),
        (Options("ensemble", dtype="float32"), "--dtype: belongs to --form merged"),
        (Options("merged", max_shard_size="big"), "--max-shard-size: found 'big', expected an integer with its unit"),
        (Options("merged", dtype="nf4"), r"--dtype: found 'nf4'.*\n.*4 bits is lossy.*peft#2321.*Merge into 16 bits"),
        (Options("merged", dtype="double"), r"found 'double', expected one of bfloat16, float16, float32"),
    ],
)
def test_options_that_cannot_be(trained: Path, options: Options, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        export(trained, trained.parent / "out", options, progress=False)
    assert not (trained.parent / "out").exists()


def test_a_base_that_is_stored_quantised_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained.parent / "base" / "config.json"
    stored = {"quant_method": "gptq", "bits": 4}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": stored}))
    monkeypatch.setattr("pipeline.export.run.merged_model", None)  # is not reached
    with pytest.raises(UserError) as error:
        export(trained, trained.parent / "out", Options("merged"), progress=False)
    message = str(error.value)
    assert f"'{trained.parent / 'base'}' is stored quantised (gptq), so there are no 16-bit weights" in message
    assert "lossy" in message and "--base MODEL" in message


def test_a_tied_embedding_is_not_merged(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, gpt2(), KINDS["embedding"][1])
    with pytest.raises(UserError, match=r"one weight as embedding and output head.*merged, it would change both"):
        export(adapter, tmp_path / "out", Options("merged"), progress=False)


def test_sums_that_are_not_finite_are_not_merged(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, llama(), lora())
    weights = {name: 1e4 * w for name, w in load_file(adapter / "adapter_model.safetensors").items()}
    save_adapter(load_adapter(stock_base(tmp_path), adapter), weights, settings(), adapter)
    with pytest.raises(UserError, match=r"cannot be merged in float16: the sum .* no finite number\.\nMerge in"):
        merged_model(schema.Base(model=str(tmp_path / "base")), adapter, "float16")


def test_a_full_disk_is_told_before_any_work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: Usage)
    for form in ("plain", "ensemble", "merged"):
        with pytest.raises(UserError, match=r"out: takes \d+ KiB, and 1 KiB are free in"):
            export(trained, trained.parent / "out", Options(form), progress=False)


def test_the_folder_is_never_overwritten_silently(trained: Path) -> None:
    out = trained.parent / "out"
    export(trained, out, Options(), progress=False)
    with pytest.raises(UserError, match="already holds an export; it is never overwritten silently"):
        export(trained, out, Options("ensemble"), progress=False)
    export(trained, out, Options("ensemble"), overwrite=True, progress=False)
    assert (out / "member-1").is_dir() and not (out / "adapter_model.safetensors").exists()
    for others in ('{"name": "a web page"}', "[]", "no JSON"):
        (out / "manifest.json").write_text(others)
        with pytest.raises(UserError, match=r"replaces exports only, and this folder has no manifest\.json of one"):
            export(trained, out, Options(), overwrite=True, progress=False)
        assert (out / "member-1").is_dir()
    with pytest.raises(UserError, match="holds the adapter itself"):
        export(trained, trained, Options(), overwrite=True, progress=False)


def test_an_error_leaves_everything_as_it_was(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = trained.parent / "out"
    export(trained, out, Options(), progress=False)
    before = sorted(file.name for file in trained.parent.iterdir())

    def breaks(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "write_card", breaks)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device\.\nNothing of it is kept"):
        export(trained, out, Options("ensemble"), overwrite=True, progress=False)
    assert sorted(file.name for file in trained.parent.iterdir()) == before
    assert (out / "adapter_model.safetensors").exists()


def test_no_base_is_loaded_for_plain_and_ensemble(trained: Path) -> None:
    """A base without weights is enough, so a 7B adapter is exported in seconds."""
    (trained.parent / "base" / "model.safetensors").unlink()
    export(trained, trained.parent / "plain", Options(), progress=False)
    export(trained, trained.parent / "members", Options("ensemble"), progress=False)
    with pytest.raises(UserError, match=r"base\.model: .*cannot be loaded"):
        export(trained, trained.parent / "merged", Options("merged"), progress=False)
    assert not (trained.parent / "merged").exists()


def test_the_check_reads_the_adapter_as_stock_peft_does(trained: Path) -> None:
    recipe = load_recipe(trained / "recipe.yaml")
    hollow = check_adapter(recipe.base, trained)
    base = load_base(recipe.base.model_copy(update={"quantization": "none", "dtype": "float32"}), torch.device("cpu"))
    stock = PeftModel.from_pretrained(base, str(trained))
    ours, theirs = (get_peft_model_state_dict(model, save_embedding_layers=False) for model in (hollow, stock))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
