"""What is said of an adapter that does not fit its recipe or its base, or whose files are damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.adapter.check import check_adapter, check_settings, ensemble_settings
from pipeline.adapter.files import AdapterSettings, read_peft_config, read_settings, save_adapter, settings_of
from pipeline.errors import UserError
from pipeline.recipe import schema


def base(folder: Path, layers: int = 2, width: int = 32) -> schema.Base:
    """A saved base of random weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return schema.Base(model=str(folder), quantization="none", dtype="float32")


TARGETS = ["q_proj", "k_proj", "down_proj"]
ADAPTER = schema.Adapter(rank=4, alpha=8.0, dropout=schema.Dropout(rate=0.5, rate_pattern={"q_proj": 0.25}))


def recipe(**adapter: Any) -> schema.Recipe:
    return schema.Recipe(
        name="t",
        base=schema.Base(model="m"),
        adapter=ADAPTER.model_copy(update=adapter),
        data=schema.Data(train=[schema.Source(path="d.json")]),
    )


def dropout(**changes: Any) -> dict[str, schema.Dropout]:
    return {"dropout": ADAPTER.dropout.model_copy(update=changes)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, schema.Base]:
    """An adapter on some layers, and its base."""
    folder = tmp_path_factory.mktemp("saved")
    its = base(folder / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    (folder / "adapter").mkdir()
    save_adapter(model, get_peft_model_state_dict(model), settings_of(ADAPTER, 7), folder / "adapter")
    return folder / "adapter", its


@pytest.fixture
def adapter(saved: tuple[Path, schema.Base], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


# --- the weights' file -----------------------------------------------------------------------------------------------


def in_memory(file: Path) -> dict[str, torch.Tensor]:
    """The tensors; ``load_file`` maps the file, which is about to be overwritten."""
    return {name: weight.clone() for name, weight in load_file(file).items()}


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def pickled(file: Path) -> None:
    torch.save(in_memory(file), file)


def pickled_long_ago(file: Path) -> None:
    torch.save(in_memory(file), file, _use_new_zipfile_serialization=False)


def a_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def a_page(file: Path) -> None:
    file.write_text("<html><body>Access denied</body></html>")


def removed(file: Path) -> None:
    file.unlink()


def only_a_bin(file: Path) -> None:
    file.rename(file.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, r"truncated: it ends after [\d,]+ bytes, before what its header lists .*\nCopy it again"),
        (cut_in_the_header, r"truncated: it ends after 60 bytes"),
        (emptied, r"truncated: it ends after 0 bytes"),
        (pickled, r"a pickle \(torch\.save\), not a safetensors file; .* can run code .*\nExpected safetensors"),
        (pickled_long_ago, r"a pickle \(torch\.save\), not a safetensors file"),
        (a_pointer, r"a Git LFS pointer, not the weights\.\nFetch them with `git lfs pull`"),
        (a_page, r"not a safetensors file \(safetensors: .*\)\.\nExpected the adapter's weights as safetensors"),
        (removed, r"no such file \(found: none\)\.\nExpected the adapter's weights"),
        (only_a_bin, r"no such file \(found: adapter_model\.bin, a pickle, which can run code"),
    ],
)
def test_a_damaged_file_is_named(adapter: Path, spoil: Any, message: str) -> None:
    spoil(adapter / "adapter_model.safetensors")
    nowhere = schema.Base(model="./no/base/is/needed")  # the file is looked at first
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: {message}"):
        check_adapter(nowhere, adapter)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_told(adapter: Path, value: str) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = in_memory(file)
    name = sorted(weights)[3]
    weights[name][0, :2] = float(value)
    save_file(weights, file)
    nowhere = schema.Base(model="./no/base/is/needed")
    count = f"{name} (2 of {weights[name].numel()})"
    with pytest.raises(UserError, match=rf"NaN or infinite values in {re.escape(count)}\.\nExpected finite numbers"):
        check_adapter(nowhere, adapter)


def test_a_good_adapter_passes(saved: tuple[Path, schema.Base]) -> None:
    folder, its = saved
    check_adapter(its, folder, read_settings(folder))


def test_missing_surplus_and_other_tensors_are_told(saved: tuple[Path, schema.Base], adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = in_memory(file)
    first, second, *_ = sorted(weights)
    shape = list(weights[first].shape)
    spoilt = {name: weight for name, weight in weights.items() if name != second}
    spoilt[first] = torch.zeros(shape[0] + 1, shape[1])
    spoilt["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(spoilt, file)
    with pytest.raises(UserError) as error:
        check_adapter(saved[1], adapter)
    message = str(error.value)
    assert f"{file}: 3 of its tensors do not fit '{saved[1].model}' with this adapter_config.json" in message
    assert f"{first}: found {[shape[0] + 1, shape[1]]}, expected {shape}" in message
    assert f"{second} is missing" in message
    assert "layers.9.mlp.up_proj.lora_A.weight belongs to no layer of the base" in message
    assert f"It was trained on '{saved[1].model}'" in message


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ({"layers": 1}, 6, "layers.1.mlp.down_proj.lora_A.weight belongs to no layer of the base"),
        ({"layers": 3}, 6, "layers.2.self_attn.q_proj.lora_A.weight is missing"),
        ({"width": 64}, 10, r"q_proj.lora_A.weight: found \[4, 32\], expected \[4, 64\]"),
    ],
)
def test_another_base_is_told(
    saved: tuple[Path, schema.Base], tmp_path: Path, shape: dict[str, int], count: int, message: str
) -> None:
    """Fewer layers load in silence in stock peft, and more with a warning."""
    with pytest.raises(UserError, match=rf"(?s): {count} of its tensors do not fit .*{message}") as error:
        check_adapter(base(tmp_path / "other", **shape), saved[0])
    assert f"and {count - 4} more" in str(error.value)


def test_modules_that_the_base_has_not(saved: tuple[Path, schema.Base], adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match=r"does not go on '.*': Target modules \{'c_attn'\} not found in the base"):
        check_adapter(saved[1], adapter)


def test_an_ensemble_that_cannot_be_masked_is_told(saved: tuple[Path, schema.Base], adapter: Path) -> None:
    masks = settings_of(recipe(**dropout(rate_pattern={"k_prj": 0.1})).adapter, 7)
    with pytest.raises(UserError, match=r"has no ensemble over masks: rate_pattern: 'k_prj' names no layer"):
        check_adapter(saved[1], adapter, masks)


# --- peft's configuration and our settings ---------------------------------------------------------------------------


def test_other_methods_are_refused_by_name(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: peft_type is 'IA3'; expected LORA or ADALORA"):
        read_peft_config(adapter)
    file.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: not JSON"):
        read_peft_config(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"rate": 7}', r"rate: found 7, expected a number, at least 0 and below 1;"),
        ('{"rate_pattern": {"q": -1}}', r"rate_pattern\.q: found -1, expected a number, at least 0 and below 1"),
        ('{"rate": "half"}', r"rate: found 'half', expected a number, at least 0 and below 1"),
        ('{"rates": 0.5}', r"rates: "),
        ("rate: 0.5", r"the file: Invalid JSON"),
        ("[]", r"the file: "),
    ],
)
def test_settings_that_cannot_be_read(adapter: Path, content: str, message: str) -> None:
    (adapter / "lora_dropout.json").write_text(content)
    with pytest.raises(UserError, match=rf"lora_dropout\.json: cannot be read \(.*{message}") as error:
        read_settings(adapter)
    assert "Expected an object with rate, instances, sampling, rescale, alpha, seed, method, rate_pattern" in str(
        error.value
    )


def test_settings_of_an_older_version_are_read(adapter: Path) -> None:
    file = adapter / "lora_dropout.json"
    written = json.loads(file.read_text())
    assert read_settings(adapter) == settings_of(ADAPTER, 7)
    file.write_text(json.dumps({key: written[key] for key in list(written)[:6]}))
    assert list(written)[6:] == ["method", "rate_pattern"]
    read = read_settings(adapter)
    assert read is not None
    assert (read.method, read.rate_pattern, read.rate, read.seed) == ("lora", {}, 0.5, 7)


@pytest.mark.parametrize(
    ("changes", "line", "override"),
    [
        (dropout(rate=0.3), "adapter.dropout.rate: trained with 0.5, the recipe has 0.3", "adapter.dropout.rate=0.5"),
        (
            dropout(rescale=False),
            "adapter.dropout.rescale: trained with true, the recipe has false",
            "adapter.dropout.rescale=true",
        ),
        (
            dropout(rate_pattern={}),
            'adapter.dropout.rate_pattern: trained with {"q_proj": 0.25}, the recipe has {}',
            'adapter.dropout.rate_pattern={"q_proj": 0.25}',
        ),
        ({"method": "adalora"}, "adapter.method: trained with lora, the recipe has adalora", "adapter.method=lora"),
        ({"alpha": 16.0}, "adapter.alpha: trained with 8.0, the recipe has 16.0", "adapter.alpha=8.0"),
        ({"rank": 8}, "adapter.rank: trained with 4, the recipe has 8", "adapter.rank=4"),
        (
            {"rank_stabilized": True},
            "adapter.rank_stabilized: trained with false, the recipe has true",
            "adapter.rank_stabilized=false",
        ),
    ],
)
def test_settings_that_disagree_are_listed(adapter: Path, changes: dict[str, Any], line: str, override: str) -> None:
    settings = read_settings(adapter)
    check_settings(settings, recipe(), adapter)
    check_settings(settings, recipe(**dropout(instances=4, sampling="instance")), adapter)  # of training alone
    with pytest.raises(UserError) as error:
        check_settings(settings, recipe(**changes), adapter)
    assert str(error.value).splitlines() == [
        f"{adapter}: trained with other settings than this recipe's, so scores would go under the wrong name:",
        f"  {line}",
        f"Use the recipe that it was trained with, or make this one agree: '{override}'",
    ]
    (adapter / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"Use its own recipe \(.*recipe\.yaml\), or make this one agree"):
        check_settings(settings, recipe(**changes), adapter)


def test_an_adapter_without_masks_takes_the_recipes(adapter: Path) -> None:
    plain = AdapterSettings(rate=0.0, instances=1, sampling="example", rescale=True, alpha=8.0, seed=1)
    for settings in (None, plain):
        check_settings(settings, recipe(), adapter)
        assert ensemble_settings(settings, recipe()) == settings_of(ADAPTER, 42)
    with pytest.raises(UserError, match=r"adapter\.alpha: trained with 8\.0, the recipe has 16\.0"):
        check_settings(plain, recipe(alpha=16.0), adapter)
    own = settings_of(ADAPTER, 7)
    assert ensemble_settings(own, recipe()) == own
