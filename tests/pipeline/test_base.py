"""Loading the base: how it is stored, and that an evaluation does not change the training after it."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.adapter.config import check_target_modules
from pipeline.base import check_device, check_length, load_base, load_config
from pipeline.errors import UserError
from pipeline.recipe import schema


def adapted(base: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def gradients_before_and_after_evaluation(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 4096, (2, 12), generator=torch.Generator().manual_seed(1))

    def gradient() -> torch.Tensor:
        model.train()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    return before, gradient()


def test_an_evaluation_leaves_nf4_gradients_alone(small_base: Path) -> None:
    model = adapted(load_base(schema.Base(model=str(small_base))))
    before, after = gradients_before_and_after_evaluation(model)
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_without_the_cure_it_does_not(tmp_path: Path) -> None:
    """Shows why `pipeline.base.keep_training_kernel` exists; when this fails, delete it."""
    if not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    # multiples of 32 everywhere: others do not even pass its assertions
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    base = load_base(schema.Base(model=str(tmp_path)))
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    before, after = gradients_before_and_after_evaluation(adapted(base))
    changed = ((after - before).norm() / before.norm()).item()
    print(f"gradients change by {changed:.0%}")
    assert changed > 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_stored_as_the_compute_dtype(small_base: Path, dtype: str, double: bool) -> None:
    base = schema.Base(model=str(small_base), dtype=dtype, double_quantization=double)  # type: ignore[arg-type]
    layers = [module for module in load_base(base).modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14  # not the head
    for layer in layers:
        state = layer.weight.quant_state
        assert layer.weight.dtype == layer.compute_dtype == getattr(torch, dtype)
        assert (state.quant_type, state.nested) == ("nf4", double)
        assert isinstance(layer.weight, bitsandbytes.nn.Params4bit) and not layer.weight.requires_grad


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_other_storage(small_base: Path, quantization: str) -> None:
    model = load_base(schema.Base(model=str(small_base), quantization=quantization))  # type: ignore[arg-type]
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}
    assert kinds == {"Linear8bitLt" if quantization == "int8" else "Linear"}
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.fixture
def prequantized(small_base: Path, tmp_path: Path) -> str:
    """A base whose configuration says that someone quantised it before."""
    config = json.loads((small_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_prequantized_base_is_refused_under_zero_3(prequantized: str) -> None:
    base = schema.Base(model=prequantized, quantization="none")
    with pytest.raises(UserError) as error:
        load_config(base, zero=3)
    message = str(error.value)
    assert f"base.model: '{prequantized}' is already quantised (gptq); ZeRO-3 cannot shard" in message
    assert "base.quantization=nf4, or zero=2" in message
    assert load_config(base, zero=2).model_type == "llama"


def test_a_prequantized_base_is_not_quantized_again(prequantized: str) -> None:
    with pytest.raises(UserError, match=r"is already quantised \(gptq\) and base\.quantization is 'nf4'"):
        load_config(schema.Base(model=prequantized), zero=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes float16")
def test_float16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"base.dtype: float16 trains on GPUs only.*\n.*base.dtype=bfloat16"):
        check_device(schema.Base(model="x", dtype="float16"))


def test_a_prequantized_base_loads_as_it_is(small_base: Path, tmp_path: Path) -> None:
    """What the refusals advise, `base.quantization=none`, works; the cure of trap 1 reaches it too."""
    load_base(schema.Base(model=str(small_base))).save_pretrained(tmp_path / "nf4")
    model = load_base(schema.Base(model=str(tmp_path / "nf4"), quantization="none"))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before, after = gradients_before_and_after_evaluation(adapted(model))
    assert torch.equal(before, after)


def test_rows_longer_than_the_positions_are_refused(small_base: Path) -> None:
    base = schema.Base(model=str(small_base))
    config = load_config(base)
    check_length(config, base, config.max_position_embeddings)
    with pytest.raises(UserError, match=r"data.max_length: found 100000, but .* made for at most"):
        check_length(config, base, 100_000)


def test_the_output_head_is_no_target(small_base: Path) -> None:
    model = load_base(schema.Base(model=str(small_base), quantization="none"))
    with pytest.raises(UserError, match=r"adapter.target_modules: lm_head matches no linear layer") as caught:
        check_target_modules(model, schema.Adapter(target_modules=["q_proj", "lm_head"]))
    assert "lm_head" not in str(caught.value).splitlines()[1]


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-thing"}'])
def test_a_folder_that_is_no_model_is_said_without_a_traceback(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"base.model: '{tmp_path}' cannot be loaded"):
        load_config(schema.Base(model=str(tmp_path)))


def test_a_model_without_weights_is_said_without_a_traceback(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((small_base / "config.json").read_text())
    with pytest.raises(UserError, match=r"base.model: .* cannot be loaded"):
        load_base(schema.Base(model=str(tmp_path), quantization="none"))


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(
        UserError, match=r"base.dtype: bfloat16 is not supported by Tesla V100.\nSet base.dtype=float16"
    ):
        check_device(schema.Base(model="any"))
    check_device(schema.Base(model="any", dtype="float16"))
