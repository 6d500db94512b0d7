"""FLOPs against a counter of every operator, shares of time against clocks, DeepSpeed's timers against its log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from training_support import random_rows, write_rows
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.utils import add_fused_lm_head

from pipeline.lora_dropout import LoraDropout, example_coordinates
from pipeline.observation.flops import base_work, data_work, empty_base_work, peak_flops, recipe_work
from pipeline.observation.throughput import Throughput
from pipeline.recipe import load_recipe

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "attn_implementation": "eager",  # whose scores are matrix products that the counter sees
}


def addmm_in_place_flop(total: torch.Size, first: torch.Size, second: torch.Size, **_: object) -> int:
    """trl's fused head adds its gradient up in place, an operator that the counter does not know."""
    return 2 * first[0] * first[1] * second[1]


IN_PLACE = {torch.ops.aten.addmm_: addmm_in_place_flop}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=20))  # heads x head width is not the hidden width


def gpt2() -> PreTrainedModel:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, attn_implementation="eager")
    return GPT2LMHeadModel(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    )


def adapted(base: PreTrainedModel, recomputes: bool) -> PeftModel:
    """As trl prepares it: fused head, inputs that require a gradient, activation checkpointing where asked for."""
    add_fused_lm_head(base)
    gpt = isinstance(base, GPT2LMHeadModel)
    targets = ["c_attn", "c_fc"] if gpt else ["q_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=gpt, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    if recomputes:  # the other kind of checkpointing stops before a layer's last product
        model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("base", "tolerance"),
    [(llama, 1e-12), (qwen3, 1e-12), (gpt2, 1e-12), (mixtral, 0.01)],  # routers' weights are left out
    ids=["llama", "qwen3", "gpt2", "mixtral"],
)
def test_flops_are_those_that_torch_counts(
    base: Callable[[], PreTrainedModel], tolerance: float, recomputes: bool
) -> None:
    torch.manual_seed(0)
    rows, tokens, copies = 2, 24, 2
    model = adapted(base(), recomputes)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work = base_work(base(), adapter)
    assert work is not None
    ids = torch.randint(96, (rows * copies, tokens))
    dropout = LoraDropout(model, rate=0.5, seed=1)
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter, dropout.masks("train", example_coordinates(0, range(rows), copies)):
        model(ids, labels=ids, fused_lm_head=True).loss.backward()

    # the last position has no next token: (T - 1) / T of the positions go through the head
    expected = data_work(work, length=tokens, trained=(tokens - 1) / tokens, copies=copies, recomputes=recomputes)
    counted = counter.get_total_flops() / (rows * tokens)
    assert counted == pytest.approx(expected.hardware, rel=tolerance)
    again = 2 * work.head * (tokens - 1) / tokens
    if recomputes:
        again += 2 * work.frozen + 2 * work.adapter + 4 * work.attention * tokens
    assert expected.model == pytest.approx(expected.hardware - copies * again)


def test_flops_of_a_recipe_are_of_its_rows(tmp_path: Path, pocket_base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", random_rows(4, seed=1))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: work\nbase: {{model: {pocket_base}}}\ndata: {{train: [{{path: {tmp_path}/rows.jsonl}}]}}\n"
        "adapter: {rank: 4, dropout: {instances: 3}}\ntraining: {gradient_checkpointing: false}\n"
    )
    recipe = load_recipe(file)
    model = LlamaForCausalLM.from_pretrained(pocket_base)
    work = empty_base_work(model.config, recipe, adapter=1000)
    assert work == base_work(model, adapter=1000)
    assert work is not None
    ids = [[5] * 2, [5] * 8, [5] * 20]
    labels = [[-100, 5], [-100] * 3 + [5] * 5, [-100] * 16 + [5] * 4]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels}).select([2, 0])  # an indexed view, as after dropping
    expected = data_work(work, length=(20**2 + 2**2) / 22, trained=5 / 22, copies=3, recomputes=False)
    assert recipe_work(work, recipe, rows) == expected


def test_peaks_are_of_the_device_that_torch_names() -> None:
    named = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 NVL": 835.5,
        "NVIDIA H200": 989.5,
        "NVIDIA GH200 480GB": 990.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA L40": 181.0,
        "NVIDIA L4": 121.0,
        "NVIDIA A10": 125.0,
        "NVIDIA A10G": None,  # another chip, of which NVIDIA states nothing
        "NVIDIA GeForce RTX 4090": 165.2,
        "Tesla T4": None,
        "Radeon": None,
    }
    assert {name: peak_flops(name, "bfloat16") for name in named} == {
        name: None if tflops is None else tflops * 1e12 for name, tflops in named.items()
    }
    assert peak_flops("Tesla T4", "float16") == 65e12
    assert peak_flops("Tesla V100-SXM2-32GB", "float16") == 125e12
    assert peak_flops("Tesla V100-PCIE-32GB", "float16") == 112e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


def test_shares_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("pipeline.observation.throughput.time.perf_counter", lambda: now[0])

    def slow(batches: list[int], seconds: float) -> Iterator[int]:
        for batch in batches:
            passes(seconds)
            yield batch

    measured = Throughput()
    arguments, state, control = TrainingArguments(report_to="none"), TrainerState(), TrainerControl()
    for step in range(2):
        assert list(measured.fetched(slow([1, 2], 0.03), tokens=1000 + 50 * step)) == [1, 2]
        passes(0.04)  # the step itself
        measured.on_step_end(arguments, state, control)
        passes(0.05)  # an evaluation: not counted
    found = measured.since_last(1100)
    assert found["data_wait"] == pytest.approx(0.6)
    assert found["tokens_per_second"] == pytest.approx(100 / 0.2)  # 1000 were there when the run went on
    assert found["peak_memory_bytes"] > 1e6 and not found.keys() & {"flops_per_second", "mfu", "communication"}
    assert measured.since_last(1100)["data_wait"] == 0.0  # since the last line


COLLECTIVES = """
import json, os, time
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch, deepspeed.comm as dist
from deepspeed.comm.comm import comms_logger
from pipeline.observation.communication import collectives_since_last
dist.init_distributed("gloo", rank=0, world_size=1)
dist.configure(enabled=True, prof_all=True, verbose=False)
tensor, found, logged = torch.ones(2_000_000), [], []
for count in (3, 5):
    started = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(tensor)
    seconds = time.perf_counter() - started
    logged.append(comms_logger.get_raw_data()["all_reduce"][8_000_000][1])
    found.append([vars(collectives_since_last()["all_reduce"]), seconds])
print(json.dumps([found, logged, len(collectives_since_last())]))
"""


def test_seconds_in_collectives_are_deepspeeds_timers(repository: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", COLLECTIVES], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found, logged, left = json.loads(process.stdout.splitlines()[-1])
    for (collective, seconds), count, latencies in zip(found, (3, 5), logged, strict=True):
        assert collective["calls"] == count and collective["bytes"] == count * 8_000_000
        assert 0 < collective["seconds"] <= seconds
        # why the log's own are not read: each is the sum of all before it. Once this fails, they can be
        assert latencies == sorted(latencies)
        assert latencies[-1] / 1000 == pytest.approx(collective["seconds"])
    assert left == 0
