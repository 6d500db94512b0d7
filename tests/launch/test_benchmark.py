"""launch/benchmark.py as a user starts it, and the base it builds; nothing here depends on how fast anything is."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import LlamaConfig, PreTrainedModel, TrainerControl, TrainerState

from launch.benchmark import benchmark
from pipeline.benchmark.measure import memory_rise
from pipeline.benchmark.random_base import random_base
from pipeline.benchmark.shapes import shape_config
from pipeline.benchmark.statistics import interval_name, timing
from pipeline.benchmark.trainers import frozen_bytes, with_shared_weights
from pipeline.benchmark.turns import EdgeCallback, Turn, TurnsCallback, Watching
from pipeline.benchmark.variants import parse_variants
from pipeline.errors import UserError
from pipeline.recipe import schema

VARIANTS = ["lora", "lora-dropout", "example", "example-2", "instance-2", "instance-2-sequential"]
CPU = torch.device("cpu")


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/benchmark.py", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


def test_table_json_and_plot_of_training_steps(repository: Path, tmp_path: Path) -> None:
    record, picture = tmp_path / "cost.json", tmp_path / "cost.svg"
    done = run(
        repository,
        *("--shape", "tiny", "--tokens", "12", "--rounds", "2", "--warmup", "2", "--variants", ",".join(VARIANTS)),
        *("training.per_device_train_batch_size=2", "--json", str(record), "--plot", str(picture)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(record.read_text())
    assert [row["name"] for row in found["variants"]] == VARIANTS
    reference = found["variants"][0]
    for row in found["variants"]:
        assert row["label"] in done.stdout
        assert list(row["phases"]) == ["forward", "forward+backward", "step"]
        for name, phase in row["phases"].items():
            low, high = phase["ratio_interval"]
            assert len(phase["seconds"]) == 2 and 0 < low <= phase["ratio"] <= high
            ratios = [a / b for a, b in zip(phase["seconds"], reference["phases"][name]["seconds"], strict=True)]
            assert phase["ratio"] == pytest.approx(sum(ratios) / 2)
        forward, both, step = (phase["median"] for phase in row["phases"].values())
        assert forward < both < step
        assert row["tokens_per_second"] == pytest.approx(2 * 12 / step)
        assert row["peak_bytes"] > found["conditions"]["base_bytes"]
    sizes = {row["name"]: row["peak_bytes"] for row in found["variants"]}
    assert sizes["instance-2"] > sizes["instance-2-sequential"]
    assert [line.partition(":")[0] for line in found["words"][:3]] == [
        "example, N = 1",
        "instance, N = 2, batched",
        "instance, N = 2, sequential",
    ]
    assert "times plain LoRA's time (range" in found["words"][0] and found["ratio_interval_is"] == "range"
    assert found["words"][3].startswith("1,000 examples of 12 tokens would take here") and len(found["words"]) == 4
    assert all(line in done.stdout for line in found["words"])
    table = done.stdout[done.stdout.index("tiny, 2 layers") :]
    assert "ratio, range" in table and "95 %" not in table
    assert max(map(len, table.splitlines())) <= 120, table
    assert "round 2 of 2" in done.stderr  # progress without a terminal
    assert found["conditions"]["activation_checkpointing"] is True  # trl's default, in every variant
    assert picture.read_text().lstrip().startswith("<?xml")


def test_one_layer_and_a_recipe_of_its_own(repository: Path, tmp_path: Path) -> None:
    record = tmp_path / "cost.json"
    done = run(
        repository,
        *("recipes/pocket/pocket.yaml", "training.per_device_train_batch_size=2", "--level", "layer"),
        *("--rounds", "2", "--variants", "lora-dropout,instance-2,instance-2-sequential", "--json", str(record)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(record.read_text())
    assert [row["name"] for row in found["variants"]] == VARIANTS[:2] + VARIANTS[4:]
    assert all(list(row["phases"]) == ["forward", "forward+backward"] for row in found["variants"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--shape"),
        (["--shape", "llama2-70x"], "expected one of tiny"),
        (["--shape", "tiny", "--variants", "exampel"], "'exampel'"),
        (["--shape", "tiny", "adapter.dropout.rate=0", "adapter.dropout.instances=1"], "needs a rate above 0"),
        (["--shape", "tiny", "--layers", "9"], "tiny has 2 layers"),
        (["--shape", "tiny", "base.quantization=int8"], "int8"),
        (["--shape", "tiny", "--plot", "cost.gif"], "--plot: found 'cost.gif', expected a name that ends in .svg"),
        (["--shape", "tiny", "--json", "/nowhere/x.json"], "--json: the folder /nowhere does not exist"),
        (["--level", "checkpoint", "--shape", "tiny", "--plot", "a.svg"], "--plot: --level checkpoint draws none"),
        (["--level", "traffic", "--shape", "tiny", "--variants", "lora"], "--level traffic has its own"),
        (["--shape", "tiny", "--tokens", "8000", "training.per_device_train_batch_size=99999"], "are needed"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str],
    expected: str,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process: a subprocess each would spend its time on imports."""
    monkeypatch.setattr(sys, "path", [str(repository), *sys.path])  # the command replaces the first
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    from launch.benchmark import benchmark
    from launch.command import run_command

    with pytest.raises(SystemExit) as ended:
        run_command(benchmark)
    assert ended.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_no_16_bit_copy_of_more_than_one_layer_while_building() -> None:
    """What building takes above the finished model is one layer's working memory, however deep the model."""
    config = shape_config("tiny")
    config.hidden_size, config.intermediate_size = 256, 704
    working = []
    for depth in (3, 12):
        config.num_hidden_layers = depth
        models: list[PreTrainedModel] = []
        gc.collect()  # else the model before, whose layers are cycles, may go while this one comes
        rise = memory_rise(partial(built_into, models, config), CPU)
        layers = [module for module in models[0].modules() if isinstance(module, Linear4bit)]
        assert len(layers) == 7 * depth
        assert all(isinstance(layer.weight, Params4bit) and layer.weight.bnb_quantized for layer in layers)
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
        working.append(rise - frozen_bytes(models[0]))
    assert working[0] == pytest.approx(working[1], rel=0.05)
    # its weight in 16 bit, and what bitsandbytes quantises it with: float32 copies of the same layer
    assert working[1] < 16 * 256 * 704
    assert working[1] < 0.4 * sum(2 * layer.in_features * layer.out_features for layer in layers)


def built_into(models: list[PreTrainedModel], config: LlamaConfig) -> None:
    models.append(random_base(config, schema.Base(model="none"), CPU, seed=1))


def test_random_base_is_the_seeds_and_shares_its_tensors_with_copies() -> None:
    base, config = schema.Base(model="none"), shape_config("tiny")
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        first, again, other = (random_base(config, base, CPU, seed)(ids).logits for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)
    model = random_base(config, base, CPU, 7)
    copy = with_shared_weights(model)
    assert copy is not model and copy.model.layers[0] is not model.model.layers[0]
    pairs = zip(model.parameters(), copy.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, first)


def test_ratio_is_taken_within_rounds() -> None:
    """A round in which the whole machine is ten times slower leaves the ratio alone."""
    reference = [1.0, 10.0, 1.0, 1.0]
    found = timing([1.5 * seconds for seconds in reference], reference, seed=0)
    assert found.ratio == pytest.approx(1.5) and found.ratio_interval == pytest.approx((1.5, 1.5))
    assert found.median == 1.5


def test_few_rounds_have_a_range_and_no_interval() -> None:
    """Of five, a 95 % interval of the median would be wider than from the least to the most."""
    ratios = [1.2, 0.9, 1.0, 1.5, 1.1, 1.1, 1.05, 1.0]
    assert timing(ratios[:5], [1.0] * 5, seed=0).ratio_interval == (0.9, 1.5)
    low, high = timing(ratios, [1.0] * 8, seed=0).ratio_interval
    assert 0.9 <= low < 1.075 < high < 1.5
    assert (interval_name(5), interval_name(6)) == ("range", "95 % interval")


def test_variants_are_the_recipes_settings_in_each_mode() -> None:
    dropout = schema.Dropout(rate=0.3, balanced=True, instances=2, sampling="instance")
    variants = {variant.name: variant for variant in parse_variants("example-3,instance-4-sequential", dropout)}
    assert list(variants) == ["lora", "example-3", "instance-4-sequential"]
    assert variants["lora"].stock and not variants["lora"].dropout.masked
    example, instance = variants["example-3"].dropout, variants["instance-4-sequential"].dropout
    assert (example.sampling, example.instances, example.rate, example.balanced) == ("example", 3, 0.3, True)
    assert (instance.sampling, instance.instances, instance.execution) == ("instance", 4, "sequential")
    with pytest.raises(UserError, match="instance-N-sequential"):
        parse_variants("instance-0", dropout)


def test_a_turn_is_its_steps_with_their_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a turn, a checkpoint after the second one; without another turn training stops."""
    channel, state, control = StringIO(), TrainerState(), TrainerControl()
    monkeypatch.setattr(sys, "stdin", StringIO("go\ngo\n"))
    watching = Watching()
    turns, edges = TurnsCallback(2, channel, watching), [EdgeCallback(watching.begins), EdgeCallback(watching.ends)]
    told: Any = (None, state, control)  # the arguments are not looked at
    for state.global_step in range(4):
        turns.on_step_begin(*told)
        edges[0].on_step_end(*told)
        if state.global_step == 2:
            sleep(0.03)
        edges[1].on_step_end(*told)
        turns.on_step_end(*told)
        if state.global_step == 1:
            sleep(0.02)
            turns.on_save(*told)
    assert not control.should_training_stop
    state.global_step = 4
    turns.on_step_begin(*told)
    assert control.should_training_stop
    _, first, second = (Turn(*json.loads(line)) for line in channel.getvalue().splitlines())
    assert first.seconds >= first.saving >= 0.02 > first.processor_seconds
    assert second.saving == 0 and second.seconds >= second.watching >= 0.03
    assert first.watching < second.watching


@pytest.mark.slow
def test_evaluation_in_every_way(repository: Path, tmp_path: Path) -> None:
    record = tmp_path / "cost.json"
    done = run(
        repository,
        *("--level", "evaluation", "--shape", "tiny", "--tokens", "30", "--rounds", "2", "--warmup", "2"),
        *("eval.ensemble.instances=2", "--json", str(record)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(record.read_text())
    ways = ["stock lm-eval, one model", "ours, one model", "ours, 2 members", "2 separate passes"]
    assert [(line["work"], line["way"]) for line in found["lines"]] == [
        (work, way) for work in ("few-shot", "choices", "decoding") for way in ways
    ]
    for line in found["lines"]:
        assert line["way"] in done.stdout
        assert len(line["timing"]["seconds"]) == 2 and line["timing"]["median"] > 0
        assert (line["against_separate"] is not None) == (line["way"] == "ours, 2 members")


def test_evaluation_refuses_what_it_has_not(repository: Path) -> None:
    done = run(repository, "recipes/alpaca.yaml", "--level", "evaluation")
    assert done.returncode == 2 and "give its --shape" in done.stderr
    for given, message in (
        ({"plot": Path("a.svg")}, "--plot: --level evaluation draws none"),
        ({"variants": "lora,example"}, "--variants: are of training steps"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark([str(repository / "recipes" / "alpaca.yaml")], level="evaluation", shape="tiny", **given)
