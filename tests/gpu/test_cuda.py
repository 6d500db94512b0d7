"""What only a CUDA device can show. Unmeasured so far: no run of this file on a GPU is on record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.lora_dropout import LoraDropout
from pipeline.lora_dropout.masks import feature_words, kept, threshold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


GOLDEN = [
    "41c333eddc4b64f0",
    "7fd0c4e43ed300f3",
    "64ca333dfb46413a",
    "4bfdf4cccdff7edd",
    "fb335ba37ecbb563",
    "9447aeff8031cee4",
]


class TwoLinears(torch.nn.Module):
    """Odd widths, so that no kernel's block size hides a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(67, 131)
        self.second = torch.nn.Linear(131, 41)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 67)`` to ``(B, 41)``."""
        return self.second(torch.tanh(self.first(x)))


def adapted(device: str) -> torch.nn.Module:
    """The same random adapter on each device."""
    torch.manual_seed(3)
    model = get_peft_model(TwoLinears(), LoraConfig(r=5, target_modules=["first", "second"], init_lora_weights=False))
    return model.to(device)


@pytest.mark.parametrize("balanced", [None, 1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"rate_pattern": {"second": 0.8}, "initial_rate": 0.1}], ids=["rate", "rates"])
def test_masks_have_the_same_bits_on_cpu_and_cuda(balanced: int | None, options: dict[str, Any]) -> None:
    coordinates = [(step, 2, copy) for step in range(50) for copy in range(balanced or 3)]
    on_cpu, on_cuda = (
        LoraDropout(adapted(device), rate=0.37, seed=11, **options).layer_masks(
            "train", coordinates, balanced=balanced, progress=0.3
        )
        for device in ("cpu", "cuda")
    )
    assert on_cpu.keys() == on_cuda.keys()
    for name, masks in on_cpu.items():
        assert on_cuda[name].bits_in.is_cuda and masks.rate == on_cuda[name].rate
        assert torch.equal(masks.kept_in, on_cuda[name].kept_in.cpu())
        assert torch.equal(masks.kept_out, on_cuda[name].kept_out.cpu())


def test_the_golden_bits_on_cuda() -> None:
    """Of tests/pipeline/test_masks.py and test_masks_balanced.py."""
    words = feature_words("model.layers.3.mlp.down_proj", "A", 64, torch.device("cuda"))
    plain = kept(words, 42, "ensemble", [(0,), (5,)], threshold(0.5))
    balanced = kept(words, 42, "ensemble", [(n,) for n in range(4)], threshold(0.4), 4)
    numbers = [f"{int(''.join(str(int(bit)) for bit in row), 2):016x}" for row in torch.cat([plain, balanced]).cpu()]
    assert numbers == GOLDEN


def test_compiled_steps_equal_eager_ones_and_new_masks_compile_nothing() -> None:
    """By the compiler that a user gets; sums in another order, hence the tolerance."""
    model = adapted("cuda")
    dropout = LoraDropout(model, rate=0.5, seed=7)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(6, 67, generator=torch.Generator().manual_seed(5)).cuda()
    for step in range(4):
        found = []
        for either in (compiled, model):
            model.zero_grad()
            with dropout.masks("train", [(step, 0), (step, 1), (step, 2)]):
                output = either(x)
                output.square().sum().backward()
            found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_examples_equal_rows_of_their_own(dtype: torch.dtype) -> None:
    """Widths of 16 bytes, so that bfloat16 takes its one kernel; three examples of 5, 0 and 11 tokens."""
    torch.manual_seed(3)
    config = LoraConfig(r=8, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)), config).to("cuda", dtype)
    dropout = LoraDropout(model, rate=0.5, seed=7)
    x = torch.randn(1, 16, 64, device="cuda", dtype=dtype)
    coordinates, lengths = [(0, 4), (0, 9), (0, 2)], [5, 0, 11]
    with dropout.masks("train", coordinates, lengths=lengths):
        packed = model(x)
        packed.float().square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    rows = []
    for coordinate, part in zip(coordinates, x.split(lengths, dim=1), strict=True):
        with dropout.masks("train", [coordinate]):
            rows.append(model(part))
            rows[-1].float().square().sum().backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    pairs = zip(
        [packed, *gradients],
        [torch.cat(rows, dim=1), *(p.grad for p in model.parameters() if p.requires_grad)],
        strict=True,
    )
    for found, expected in pairs:
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_masked_forward_and_gradients_equal_the_cpus() -> None:
    x = torch.randn(6, 67, generator=torch.Generator().manual_seed(5))
    outputs, gradients = {}, {}
    for device in ("cpu", "cuda"):
        model = adapted(device)
        with LoraDropout(model, rate=0.5, seed=7).masks("train", [(0,), (1,), (2,)]):
            output = model(x.to(device))
            output.square().sum().backward()
        outputs[device] = output.detach().cpu()
        gradients[device] = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(outputs["cuda"], outputs["cpu"], rtol=1e-4, atol=1e-4)  # TF32 is off by default
    for cuda, cpu in zip(gradients["cuda"], gradients["cpu"], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_run_trains_and_evaluates_on_the_device(tmp_path: Path, repository: Path, quantization: str) -> None:
    command = [
        sys.executable,
        "launch/sft.py",
        "recipes/pocket/pocket.yaml",
        f"output={tmp_path}",
        "training.max_steps=20",
    ]
    command += [f"base.quantization={quantization}", "training.eval_steps=10", "training.logging_steps=10", "--no-eval"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "pocket" / "history.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[-1] < losses[0]
    command = [sys.executable, "launch/evaluate.py", "recipes/pocket/pocket.yaml", "eval.limit=8", f"output={tmp_path}"]
    command += [f"base.quantization={quantization}", "--output", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results" / "pocket" / "latest" / "report.html").exists()
