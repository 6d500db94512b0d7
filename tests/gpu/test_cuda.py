"""What only a CUDA device can show. Unmeasured so far: no run of this file on a GPU is on record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.lora_dropout import LoraDropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
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


def test_masks_have_the_same_bits_on_cpu_and_cuda() -> None:
    coordinates = [(step, 2, copy) for step in range(50) for copy in range(3)]
    on_cpu = LoraDropout(adapted("cpu"), rate=0.37, seed=11).layer_masks("train", coordinates)
    on_cuda = LoraDropout(adapted("cuda"), rate=0.37, seed=11).layer_masks("train", coordinates)
    assert on_cpu.keys() == on_cuda.keys()
    for name, masks in on_cpu.items():
        assert torch.equal(masks.kept_in, on_cuda[name].kept_in.cpu())
        assert torch.equal(masks.kept_out, on_cuda[name].kept_out.cpu())


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
